"""Language models that are wrapped together with a vision model: the whole checkpoint is edited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.run import run_job
from tests.conftest import GOLDEN
from tests.e2e.conftest import HERE, facts, job
from tests.pipeline.models.test_checks import TINY, VISION

TEXT = {**TINY, "max_position_embeddings": 128}
PROCESSOR = {"processor_class": "Some", "image_size": 28}


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llama4() -> nn.Module:
    text = {
        **TEXT,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
    }
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32}
    vision |= {"projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    return transformers.Llama4ForConditionalGeneration(config)


def mistral3() -> nn.Module:
    config = transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 16},
        image_token_index=3,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


@pytest.mark.parametrize("wrapper", [gemma3, qwen2_5_vl, llama4, mistral3])
def test_text_is_edited_and_all_else_stays(wrapper: Any, inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = wrapper().eval()
    with torch.no_grad():
        for weight in whole.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    base = tmp_path / "base"
    whole.save_pretrained(base)
    for file in (GOLDEN / "llama" / "model").glob("tokenizer*"):
        shutil.copy(file, base)
    (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    layers = [0, 2] if wrapper is llama4 else [1, 2]
    hparams = tmp_path / "hparams.json"
    hparams.write_text(json.dumps({"layers": layers, "v_num_grad_steps": 3, "v_lr": 0.5}))
    config = job(
        inputs,
        str(tmp_path / "out"),
        model=str(base),
        hparams=str(hparams),
        second_moments=None,
        **HERE,
    )
    result = run_job(config)
    edited = tmp_path / "out" / "model"

    # Files and tensors are the base's, under the same names, but for the edited weights.
    assert {f.name for f in base.iterdir()} <= {f.name for f in edited.iterdir()}
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (edited / name).read_bytes() == (base / name).read_bytes()
    changed = [name for name, same in _compared(base, edited).items() if not same]
    assert len(changed) == len(layers)
    for name, layer in zip(sorted(changed), layers, strict=True):
        assert f"layers.{layer}." in name
        assert name.endswith("down_proj.weight")

    # What answers has changed, and what is published is what was measured.
    with torch.no_grad():
        tokens = torch.arange(7, 19)[None]
        models = [_opened(folder) for folder in (base, edited)]
        before, after = (model(input_ids=tokens).logits for model in models)
    assert (after - before).abs().max() > 1e-3
    assert result.metrics["counts"]["edited"] == len(facts())


def _compared(base: Path, edited: Path) -> dict[str, bool]:
    """For each tensor of two checkpoints, whether it is the same."""
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(edited / "model.safetensors", "pt") as after,
    ):
        assert list(before.keys()) == list(after.keys())
        names = list(before.keys())
        return {n: torch.equal(before.get_tensor(n), after.get_tensor(n)) for n in names}


def _opened(folder: Path) -> Any:
    """The model as a server opens it: whole, or as transformers reads its language model alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = AutoModelForCausalLM if config.model_type == "llama4" else AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32).eval()
