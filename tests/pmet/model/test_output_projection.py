"""The attention output projection, found inside the block that a file may name instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pmet import compute_targets
from pmet.errors import ArchitectureError
from pmet.hparams import PMETHyperParams
from pmet.model.architecture import Family, resolve
from tests.conftest import Golden

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = {
    "layer_module_tmp": "model.layers.{}",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}
GPT2 = {
    "layer_module_tmp": "transformer.h.{}",
    "attn_module_tmp": "transformer.h.{}.attn",
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}
BLOOM = {
    "layer_module_tmp": "transformer.h.{}",
    "attn_module_tmp": "transformer.h.{}.self_attention",
    "rewrite_module_tmp": "transformer.h.{}.mlp.dense_4h_to_h",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.word_embeddings",
}
BERT = {
    "layer_module_tmp": "bert.encoder.layer.{}",
    "attn_module_tmp": "bert.encoder.layer.{}.attention",
    "rewrite_module_tmp": "bert.encoder.layer.{}.output.dense",
    "ln_f_module": "cls.predictions.transform.LayerNorm",
    "lm_head_module": "cls.predictions.decoder",
}


def skeleton(model_type: str, **config: Any) -> nn.Module:
    """A model on the meta device, as a plan opens it."""
    if model_type == "bert":
        config["is_decoder"] = True
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **(BASE | config)), attn_implementation="eager"
        )


def found(model: nn.Module, names: dict[str, str], **changes: Any) -> Family:
    return resolve(model, PMETHyperParams.from_dict({"layers": [0, 1], **names, **changes})).family


@pytest.mark.parametrize(
    ("model_type", "names", "projection"),
    [
        # One matrix is as wide as the model: queries, keys and values are one matrix.
        ("bloom", BLOOM, "transformer.h.{}.self_attention.dense"),
        ("gpt_bigcode", GPT2, "transformer.h.{}.attn.c_proj"),
        # Several are; one has the usual name of an output projection.
        ("cohere", LLAMA, "model.layers.{}.self_attn.o_proj"),
        ("helium", LLAMA, "model.layers.{}.self_attn.o_proj"),
        # The block adds a residual and a norm behind its projection.
        ("bert", BERT, "bert.encoder.layer.{}.attention.output.dense"),
    ],
)
def test_the_projection_in_a_named_block_is_found(
    model_type: str, names: dict[str, str], projection: str
) -> None:
    family = found(skeleton(model_type, num_key_value_heads=4, head_dim=8), names)
    assert family.attention_projection == projection


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "gpt2",
            {"attn_module_tmp": "transformer.h.{}.ln_1"},
            r"transformer\.h\.\{\}\.ln_1 is a LayerNorm without an output projection; name the "
            r"attention output projection, transformer\.h\.\{\}\.attn\.c_proj, or remove the key",
        ),
        (
            "gpt2",
            {"attn_module_tmp": "transformer.h.{}.attn.c_attn"},
            r"c_attn is a Conv1D of width 96, but the model's width is 32; name .*attn\.c_proj",
        ),
        (
            "gpt2",
            {"attn_module_tmp": "transformer.h.{}"},
            r"transformer\.h\.\{\} is or holds transformer\.h\.\{\}\.mlp\.c_proj, whose weight is",
        ),
        (
            "gpt2",
            {"attn_module_tmp": "transformer.h.{}.mlp"},
            r"transformer\.h\.\{\}\.mlp is or holds transformer\.h\.\{\}\.mlp\.c_proj",
        ),
        (
            "gpt2",
            {"rewrite_module_tmp": "transformer.h.{}.attn.c_proj"},
            r"attn\.c_proj is or holds transformer\.h\.\{\}\.attn\.c_proj, whose weight is edited",
        ),
        (
            "bert",
            BERT | {"attn_module_tmp": "bert.encoder.layer.{}.attention.self"},
            r"attention\.self is a BertSelfAttention without an output projection; name the "
            r"attention output projection, bert\.encoder\.layer\.\{\}\.attention\.output\.dense",
        ),
    ],
)
def test_what_holds_no_such_projection_is_refused_with_what_to_name(
    model_type: str, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ArchitectureError, match=message):
        found(skeleton(model_type), changes)


def test_a_projection_outside_of_the_layers_is_refused() -> None:
    model = skeleton("gpt2")
    model.aside = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
    with pytest.raises(ArchitectureError, match=r"aside\.\{\} is outside the layer transformer\.h"):
        found(model, {"attn_module_tmp": "aside.{}"})


def test_block_and_projection_give_the_same_bits(golden: Golden) -> None:
    template = str(golden.hparams.attn_module_tmp)
    block = golden.hparams.model_copy(
        update={"attn_module_tmp": template.rpartition(".")[0], "v_num_grad_steps": 4}
    )
    projection = golden.hparams.model_copy(update={"v_num_grad_steps": 4})
    first, second = (
        compute_targets(
            golden.model,
            golden.tokenizer,
            golden.requests[:4],
            hparams,
            context_templates=golden.context_templates,
        )
        for hparams in (block, projection)
    )
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.losses, second.losses)
