"""Scaled positions of GGUF files are restored or refused, never ignored."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.errors import ModelError
from pipeline.models import Checkpoint, open_model_folder
from tests.gguf_models import write_gguf

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_of(tmp_path: Path, **options: Any) -> dict[str, Any]:
    write_gguf(tmp_path / "a.gguf", **options)
    folder = open_model_folder(str(tmp_path / "a.gguf"), tmp_path / "cache")
    return dict(Checkpoint.open(folder).config["rope_parameters"])


def llama3_divisors() -> np.ndarray:
    """What llama.cpp stores: the frequencies without scaling by those with it."""
    config = LlamaConfig(head_dim=16, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(8) / 8)
    return (plain / scaled).numpy().astype(np.float32)


def test_llama_3_gets_its_scaling_back(tmp_path: Path) -> None:
    rope = rope_of(tmp_path, extra={"rope_freqs.weight": llama3_divisors()})
    assert rope == {**LLAMA3, "factor": pytest.approx(8.0)}


def test_divisors_of_one_change_nothing(tmp_path: Path) -> None:
    rope = rope_of(tmp_path, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert rope["rope_type"] == "default"


def test_linear_scaling_is_restored(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    assert rope_of(tmp_path, change=change) == {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": 4.0,
    }


def _yarn(writer: Any) -> None:
    writer.add_string("llama.rope.scaling.type", "yarn")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"change": _yarn}, "yarn"),
        ({"extra": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}}, "by frequency"),
        ({"extra": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "by frequency"),
    ],
)
def test_any_other_scaling_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=rf"scales its rotary positions \({what}\), which"):
        rope_of(tmp_path, **options)
