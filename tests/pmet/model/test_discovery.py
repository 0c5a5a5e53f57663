"""What small copies of models show about their parts, and what they keep of their models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pmet.model.discovery import Branch, Effect, UnknownAnatomyError, anatomy
from pmet.model.experts import Stacked
from pmet.model.miniature import DEPTH, VOCABULARY, miniature_of
from tests.conftest import load_golden

LARGE = {
    "vocab_size": 50_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "eos_token_id": 49_999,
}


def whole(model_type: str, **config: Any) -> nn.Module:
    """A model of ordinary size, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))


@pytest.mark.parametrize(
    ("model_type", "attention", "ffn"),
    [
        ("llama", Effect.ADDED, Effect.ADDED),
        ("gemma2", Effect.NORMED, Effect.NORMED),  # norms around both blocks
        ("granite", Effect.SCALED, Effect.SCALED),
        ("phimoe", Effect.ADDED, Effect.ADDED),
    ],
)
def test_what_writes_to_the_residual_stream_and_how(
    model_type: str, attention: Effect, ffn: Effect
) -> None:
    scaled = {"residual_multiplier": 0.5} if model_type == "granite" else {}
    parts = anatomy(miniature_of(whole(model_type, **LARGE, num_hidden_layers=24, **scaled)))
    assert (parts.layers, parts.head, parts.causal) == ("model.layers", "lm_head", True)
    experts = model_type == "phimoe"
    name = "mlp.experts" if experts else "mlp.down_proj"
    stacked = Stacked("down_proj", transposed=False, per_token=2) if experts else None
    for branches in parts.branches:
        assert set(branches) == {
            Branch("self_attn.o_proj", True, attention),
            Branch(name, False, ffn, experts, stacked),
        }


def test_a_small_copy_is_small_and_has_every_kind_of_layer() -> None:
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    model = whole("gemma3_text", **LARGE, num_hidden_layers=24, layer_types=kinds * 2)
    small = miniature_of(model)
    assert small.layers == (0, 1, 2, 11)
    config: Any = small.model.config
    assert config.layer_types == [kinds[i] for i in small.layers]
    assert config.vocab_size == VOCABULARY
    assert config.eos_token_id == 0
    assert sum(p.numel() for p in small.model.parameters()) < 100_000
    assert miniature_of(model) is small is miniature_of(small.model)
    other = whole("gemma3_text", **LARGE, num_hidden_layers=24, layer_types=kinds[:1] * 24)
    assert miniature_of(other).layers == tuple(range(DEPTH))


def test_making_one_draws_no_random_number_and_leaves_the_model_alone() -> None:
    model = load_golden("gpt2").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = str(model.config)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    anatomy(miniature_of(model))
    assert torch.equal(torch.rand(2), expected)
    assert str(model.config) == config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_whose_layers_are_no_chain_is_unknown() -> None:
    with pytest.raises(UnknownAnatomyError, match="no list of layers in which each one"):
        anatomy(miniature_of(whole("xlm", emb_dim=64, n_heads=4, n_layers=3, causal=True)))
