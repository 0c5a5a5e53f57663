"""Finding a model's parts, and the error that asks for the names of those not found."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from pmet.errors import ArchitectureError
from pmet.hparams import PMETHyperParams
from pmet.model.architecture import resolve
from pmet.model.miniature import NoMiniatureError
from tests.conftest import Golden


def bare(golden: Golden, **changes: object) -> PMETHyperParams:
    """Hyper-parameters that name no modules, so that they must be found."""
    return PMETHyperParams.from_dict({"layers": list(golden.hparams.layers)} | changes)


def test_what_the_golden_files_name_is_found(golden: Golden) -> None:
    assert resolve(golden.model, bare(golden)) == resolve(golden.model, golden.hparams)


def test_orientation_and_widths(golden: Golden) -> None:
    layout = resolve(golden.model, golden.hparams)
    weight = layout.weight(golden.model, golden.hparams.target_layer)
    delta_VK = torch.zeros(layout.value_width, layout.key_width)
    assert layout.orient(delta_VK).shape == weight.shape
    assert layout.value_width == golden.model.config.hidden_size
    assert layout.transposed == (golden.family == "gpt2")


def test_the_error_about_a_model_without_a_small_copy_names_the_keys_to_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(_model: object) -> None:
        raise NoMiniatureError("ValueError: widths must be odd")

    monkeypatch.setattr("pmet.model.found_parts.miniature_of", none)
    model = bert(is_decoder=True)
    with pytest.raises(
        ArchitectureError, match=r"could not be found by trying a small copy of it .*odd"
    ) as error:
        resolve(model, PMETHyperParams(layers=(0,)))
    for name in ("layer_module_tmp", "attn_module_tmp", "rewrite_module_tmps"):
        assert name in str(error.value)
    named = PMETHyperParams(
        layers=(0, 1),
        layer_module_tmp="bert.encoder.layer.{}",
        attn_module_tmp="bert.encoder.layer.{}.attention.output.dense",
        rewrite_module_tmps=("bert.encoder.layer.{}.output.dense",),
    )
    assert resolve(model, named).key_width == 16


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="lets tokens attend to later tokens"):
        resolve(bert(), PMETHyperParams(layers=(0,)))


def bert(**changes: object) -> BertLMHeadModel:
    tiny = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
    return BertLMHeadModel(BertConfig(**tiny, intermediate_size=16, **changes))


def test_published_neox_files_call_the_head_by_its_former_name() -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**tiny, intermediate_size=16))
    hparams = PMETHyperParams(layers=(0,), lm_head_module="embed_out")
    assert resolve(model, hparams).head(model) is model.get_output_embeddings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1, 7]}, r"names \[7\], but the model has layers 0 to 4"),
        ({"v_loss_layer": 2}, "read from the model's last layer, 4"),
        ({"rewrite_module_tmps": ["transformer.h.{}.mlp.c_prog"]}, "no module .*c_prog"),
        ({"rewrite_module_tmps": ["transformer.h.{}.ln_1"]}, "without a two-dimensional"),
        ({"layer_module_tmp": "transformer.wte.{}"}, "not a list of layers"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=5, vocab_size=11))
    with pytest.raises(ArchitectureError, match=message):
        resolve(model, PMETHyperParams.from_dict({"layers": [1, 2]} | change))
