"""The private names of transformers that are used exist in the release that is installed."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTJConfig, GPTJModel

from pmet.model.transformers_internals import NAMES, position_tables
from tests.internals import assert_has, exists

WHERE = "pmet/model/transformers_internals.py"
TABLE = "transformers.GPTJModel.embed_positions"


@pytest.mark.parametrize("name", NAMES)
def test_transformers_has_the_name(name: str) -> None:
    if name == TABLE:
        sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "rotary_dim": 2, "n_positions": 6}
        with torch.device("meta"):
            model = GPTJModel(GPTJConfig(**sizes))
        found = {table.shape for _, _, table in position_tables(model)}
        assert_has(found == {(6, 2)}, name, NAMES, "transformers", WHERE)
    else:
        assert_has(exists(name), name, NAMES, "transformers", WHERE)
