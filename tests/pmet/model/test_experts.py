"""Keys of routed experts, read with the identity in place of their down-projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from pmet.model.experts import Stacked, noting_routed_keys, routed_keys

TOKENS, EXPERTS = 5, 4
SIZES = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "experts_implementation": "eager"}


def experts(kind: Any, config: Any, width: int, inner: int) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = kind(config(hidden_size=width, intermediate_size=inner, **SIZES))
    for weight in module.parameters():
        weight.data.normal_(std=0.3)
    return module


def call(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and gates; the last token is routed to one expert of this process."""
    index = torch.tensor([[0, 1], [1, 3], [3, 0], [2, 1], [0, EXPERTS]])
    return torch.randn(TOKENS, width), index, torch.rand(TOKENS, 2)


@pytest.mark.parametrize("inner", [12, 16, 40], ids=["narrower", "as wide", "wider"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_output_is_what_the_keys_give(kind: str, inner: int) -> None:
    if kind == "mixtral":
        module = experts(MixtralExperts, MixtralConfig, 16, inner)
    else:
        module = experts(GptOssExperts, GptOssConfig, 16, inner)
    hidden, index, gates = call(16)
    if kind == "gpt_oss":
        index = index.clamp_max(EXPERTS - 1)
    stacked = Stacked("down_proj", transposed=kind == "gpt_oss", per_token=2)
    with torch.no_grad():
        output = module(hidden, index, gates)
        keys = routed_keys(module, stacked, (hidden, index, gates), {})
        weight = module.down_proj.mT if stacked.transposed else module.down_proj
        parts = torch.einsum("pdk,pk->pd", weight[keys.experts_P], keys.keys_PK)
        again = torch.zeros(TOKENS, 16).index_add(0, keys.rows_P, parts)
        if kind == "gpt_oss":
            again += (gates[..., None] * module.down_proj_bias[index]).sum(1)
    assert keys.keys_PK.shape == (int((index < EXPERTS).sum()), inner)
    assert torch.allclose(again, output, atol=1e-5)


def test_reading_leaves_the_module_as_it_is_and_picks_tokens() -> None:
    module = experts(MixtralExperts, MixtralConfig, 16, 24)
    hidden, index, gates = call(16)
    before = {name: p.clone() for name, p in module.named_parameters()}
    expected = module(hidden, index, gates)
    seen: list[Any] = []
    stacked = Stacked("down_proj", transposed=False, per_token=2)
    with noting_routed_keys(module, stacked, seen.append, lambda rows: rows[2:4]):
        assert torch.equal(module(hidden, top_k_index=index, top_k_weights=gates), expected)
    assert torch.equal(module(hidden, index, gates), expected)
    assert {n: p.tolist() for n, p in module.named_parameters()} == {
        n: p.tolist() for n, p in before.items()
    }
    (keys,) = seen
    assert keys.experts_P.tolist() == [3, 0, 2, 1]
    assert keys.rows_P.tolist() == [0, 0, 1, 1]
    whole = routed_keys(module, stacked, (hidden, index, gates), {})
    assert torch.allclose(keys.keys_PK, whole.keys_PK[4:8], atol=1e-6)
