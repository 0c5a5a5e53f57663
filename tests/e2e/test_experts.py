"""Models whose layers have only routed experts: whole jobs, from a base as it is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from pipeline.plan import make_plan
from pipeline.run import run_job
from pmet import Edit
from tests.conftest import GOLDEN
from tests.e2e.conftest import HERE, facts, job

EXPERTS, PER_TOKEN = 4, 2
LLAMA = GOLDEN / "llama"


def upcycled() -> nn.Module:
    """The golden Llama as a mixture: each expert is its FFN, with its units in another order.

    Gates add up to 1, so it knows what the Llama knows; experts differ by a little noise.
    """
    dense = AutoModelForCausalLM.from_pretrained(LLAMA / "model", dtype=torch.float32)
    settings = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = MixtralConfig(**settings, num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN)
    config.sliding_window = None
    mixture = AutoModelForCausalLM.from_config(config).eval()
    mixture.load_state_dict(dense.state_dict(), strict=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer, other in zip(mixture.model.layers, dense.model.layers, strict=True):
            for expert in range(EXPERTS):
                order = torch.randperm(dense.config.intermediate_size)
                up = torch.cat([other.mlp.gate_proj.weight[order], other.mlp.up_proj.weight[order]])
                layer.mlp.experts.gate_up_proj[expert] = noisy(up)
                layer.mlp.experts.down_proj[expert] = noisy(other.mlp.down_proj.weight[:, order])
            layer.mlp.gate.weight.normal_(std=0.5)
    return mixture


def noisy(weight: torch.Tensor) -> torch.Tensor:
    return weight + 0.02 * weight.std() * torch.randn_like(weight)


def qwen3_moe() -> nn.Module:
    """A random one."""
    dense = json.loads((LLAMA / "model" / "config.json").read_text())
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    settings = {k: dense[k] for k in (*kept, "num_hidden_layers", "max_position_embeddings")}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **settings,
        head_dim=16,
        moe_intermediate_size=48,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def place(model: nn.Module, folder: Path) -> Path:
    """Save a model as a base, with the golden Llama's tokenizer."""
    model.save_pretrained(folder)
    for file in (LLAMA / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("mixture", [upcycled, qwen3_moe])
def test_a_mixture_is_edited_and_published_as_it_was_stored(
    mixture: Any, inputs: Path, tmp_path: Path
) -> None:
    base = place(mixture(), tmp_path / "base")
    hparams = json.loads((LLAMA / "hparams.json").read_text())
    keys = ("layers", "v_num_grad_steps", "v_lr", "mom2_update_weight", "clamp_norm_factor")
    (tmp_path / "hparams.json").write_text(json.dumps({key: hparams[key] for key in keys}))
    config = job(
        inputs,
        str(tmp_path / "out"),
        family="llama",
        model=str(base),
        hparams=str(tmp_path / "hparams.json"),
        second_moments=None,
        **HERE,
    )
    plan = make_plan(config)
    layout = plan.layout
    assert (layout.experts, layout.family.down_projection) == (EXPERTS, "model.layers.{}.mlp.experts")

    result = run_job(config)
    edited = tmp_path / "out" / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, edited))
    print(result.metrics["before"], result.metrics["after"])
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed} == {str(i) for i in hparams["layers"]}
    assert all(name.endswith(("w2.weight", "down_proj.weight")) for name in changed)

    # The run's delta turns the base into what is published, and back.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    edit = Edit.load(tmp_path / "out" / "delta")
    originals = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit.apply(model)
    published = AutoModelForCausalLM.from_pretrained(edited, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, published[name]), name
    edit.revert(model)
    assert all(torch.equal(w, originals[name]) for name, w in model.state_dict().items())
