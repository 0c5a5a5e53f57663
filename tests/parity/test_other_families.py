"""Families that no code names: their parts are found, and edits equal those of the plain form.

Some cannot take keys and values of prefixes from elsewhere (ALiBi, recurrent layers, keys shared
among layers); their prompts run whole. The names of the modules are written here by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pmet
from pmet.errors import ArchitectureError
from pmet.hparams import PMETHyperParams
from pmet.model.architecture import resolve
from pmet.reference import plain_deltas, plain_evaluate, plain_targets
from pmet.targets.mechanism import why_whole
from pmet.update.mechanism import why_read_whole
from tests.parity.test_families import (
    CONTEXTS,
    DELTA,
    DEPTH,
    FIGURES,
    HPARAMS,
    MEASURED,
    REQUESTS,
    TARGET,
    WIDTH,
    WINDOW,
    Variant,
    build,
    llama_like,
    worst,
)

GPT = {"n_embd": WIDTH, "n_head": 4, "n_layer": DEPTH, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
HYBRID = ["linear_attention", "full_attention"] * (DEPTH // 2)


def variant(
    model_type: str, layer: str, attention: str, ffn: str, name: str = "", **config: Any
) -> Variant:
    return Variant(name or model_type, model_type, f"{layer}.{attention}", f"{layer}.{ffn}", config)


def llama_named(model_type: str, attention: str, ffn: str, **config: Any) -> Variant:
    settings = llama_like("", "").config | config
    return variant(model_type, "model.layers.{}", attention, ffn, **settings)


FAST = [
    llama_like("olmo3", "olmo3", sliding_window=WINDOW),
    llama_like("cohere", "cohere"),
    llama_like("cohere2", "cohere2", sliding_window=WINDOW),
    llama_like("glm", "glm"),
    llama_like("glm4", "glm4"),
    llama_like("nemotron", "nemotron"),
    llama_like("ernie4_5", "ernie4_5"),
    llama_like("helium", "helium"),
    llama_like("internlm3", "internlm3"),
    llama_like("ministral3", "ministral3"),
    llama_like("vaultgemma", "vaultgemma", query_pre_attn_scalar=8),
    llama_like("hunyuan_v1_dense", "hunyuan_v1_dense"),
    llama_like("exaone4", "exaone4", sliding_window=WINDOW),
    llama_like("apertus", "apertus"),
    llama_like("arcee", "arcee"),
    llama_like("seed_oss", "seed_oss"),
    llama_named("nanochat", "self_attn.o_proj", "mlp.fc2"),
    llama_named("persimmon", "self_attn.dense", "mlp.dense_4h_to_h", num_key_value_heads=4),
    llama_named(
        "qwen2_moe",
        "self_attn.o_proj",
        "mlp.shared_expert.down_proj",
        shared_expert_intermediate_size=24,
        **EXPERTS,
    ),
    llama_named(
        "llama4_text",
        "self_attn.o_proj",
        "feed_forward.shared_expert.down_proj",
        num_local_experts=4,
        interleave_moe_layer_step=1,
        intermediate_size_mlp=48,
    ),
    variant("gpt_bigcode", "transformer.h.{}", "attn.c_proj", "mlp.c_proj", **GPT),
    variant("codegen", "transformer.h.{}", "attn.out_proj", "mlp.fc_out", **GPT, rotary_dim=4),
]


def mixture(model_type: str, block: str = "mlp", **config: Any) -> Variant:
    """Layers with routed experts alone; the plain form reads their keys as gradients."""
    return llama_named(model_type, "self_attn.o_proj", f"{block}.experts", **config)


LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAST += [
    mixture("mixtral", **LOCAL),
    mixture("qwen3_moe", decoder_sparse_step=1, **EXPERTS),
    mixture("olmoe", **EXPERTS),
    mixture("gpt_oss", sliding_window=WINDOW, **LOCAL),
    mixture("granitemoe", "block_sparse_moe", **LOCAL),
    mixture("minimax_m2", **LOCAL),
    mixture("phimoe", **LOCAL),
    mixture("flex_olmo", num_experts=4, num_experts_per_tok=2),
    mixture("cohere2_moe", **EXPERTS, first_k_dense_replace=0),
]
WHOLE = [
    # Its attention mask depends on the hidden states, and so has a gradient.
    llama_like("doge", "doge"),
    variant(
        "bloom",
        "transformer.h.{}",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        hidden_size=WIDTH,
        n_layer=DEPTH,
        n_head=4,
    ),
    variant(
        "mpt",
        "transformer.blocks.{}",
        "attn.out_proj",
        "ffn.down_proj",
        d_model=WIDTH,
        n_layers=DEPTH,
        n_heads=4,
        max_seq_len=128,
        expansion_ratio=2,
    ),
    llama_named(
        "gemma4_text",
        "self_attn.o_proj",
        "mlp.down_proj",
        layer_types=["sliding_attention", "full_attention"] * (DEPTH // 2),
        sliding_window=WINDOW,
        global_head_dim=16,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=700,
    ),
    llama_named(
        "falcon_h1",
        "self_attn.o_proj",
        "feed_forward.down_proj",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        **MAMBA,
    ),
    llama_named(
        "granitemoehybrid",
        "self_attn.o_proj",
        "shared_mlp.output_linear",
        layer_types=["mamba", "attention"] * (DEPTH // 2),
        num_local_experts=0,
        shared_intermediate_size=48,
        mamba_n_heads=8,
        mamba_d_head=8,
        **MAMBA,
    ),
    llama_named(
        "qwen3_next",
        "self_attn.o_proj",
        "mlp.shared_expert.down_proj",
        layer_types=HYBRID,
        shared_expert_intermediate_size=24,
        **EXPERTS,
        **LINEAR,
    ),
    llama_named("qwen3_5_text", "self_attn.o_proj", "mlp.down_proj", layer_types=HYBRID, **LINEAR),
    llama_named(
        "lfm2",
        "self_attn.out_proj",
        "feed_forward.w2",
        layer_types=["conv", "full_attention"] * (DEPTH // 2),
        block_auto_adjust_ff_dim=False,
    ),
    llama_named(
        "deepseek_v3",
        "self_attn.o_proj",
        "mlp.shared_experts.down_proj",
        first_k_dense_replace=0,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        **LATENT,
    ),
]
# Of all lengths; the first is a subject of one token.
SOME = [REQUESTS[i] for i in (2, 0, 1, 6, 7)]
SOME_MEASURED = [MEASURED[i] for i in (2, 0, 1)]


@pytest.mark.parametrize(
    ("chosen", "whole"),
    [
        pytest.param(chosen, whole, id=chosen.name)
        for group, whole in ((FAST, False), (WHOLE, True))
        for chosen in group
    ],
)
def test_an_edit_is_that_of_the_plain_form(
    chosen: Variant, whole: bool, golden_tokenizer: Any
) -> None:
    model = build(chosen)
    found = PMETHyperParams.from_dict({**HPARAMS, "v_num_grad_steps": 3})
    named = found.model_copy(
        update={"rewrite_module_tmps": (chosen.ffn,), "attn_module_tmp": chosen.attention}
    )
    layout = resolve(model, found)
    assert layout.family.attention_projection == chosen.attention
    assert layout.family.down_projection == chosen.ffn
    assert (why_whole(model, layout) is not None) == whole
    assert (why_read_whole(model, layout) is not None) == whole

    plain = plain_targets(model, golden_tokenizer, SOME, named, CONTEXTS)
    fast = pmet.compute_targets(
        model, golden_tokenizer, SOME, found, context_templates=CONTEXTS, batch_size=4
    )
    assert fast.steps.tolist() == plain.steps.tolist()
    assert worst(fast.values, plain.values) <= TARGET
    assert plain.losses.max() < fast.first_losses.max()

    moments: dict[int, Tensor] = {}
    for layer in found.layers:
        width = layout.key_width
        samples_XNK = torch.randn(max(1, layout.experts), 2 * width, width)
        moments[layer] = (samples_XNK.mT @ samples_XNK / (2 * width)).view(layout.moment_shape)
    # Experts are summed and solved for one by one.
    further: dict[str, Any] = {"solves": 2, "mom2_update_share": 0.5}
    for options in ({}, further) if layout.experts else ({},):
        deltas = plain_deltas(
            model,
            golden_tokenizer,
            SOME,
            named.model_copy(update=options),
            CONTEXTS,
            moments,
            plain.values,
        )
        edit = pmet.compute_edit(
            model,
            golden_tokenizer,
            SOME,
            found.model_copy(update=options),
            context_templates=CONTEXTS,
            second_moments=moments,
            targets=plain.values,
        )
        for name, expected in deltas.items():
            assert (edit.deltas[name].double() - expected).norm() <= DELTA * expected.norm(), name

    scores = pmet.evaluate(model, golden_tokenizer, SOME_MEASURED)
    expected_scores = plain_evaluate(model, golden_tokenizer, SOME_MEASURED)
    for figure in FIGURES:
        assert scores[figure] == pytest.approx(expected_scores[figure], abs=1e-12)


def test_experts_that_no_request_is_routed_to_stay_as_they_are(golden_tokenizer: Any) -> None:
    model = build(mixture("mixtral", num_local_experts=16, num_experts_per_tok=2))
    hparams = PMETHyperParams.from_dict(HPARAMS)
    layout = resolve(model, hparams)
    moments = {layer: torch.eye(layout.key_width).expand(16, -1, -1) for layer in hparams.layers}
    edit = pmet.compute_edit(
        model,
        golden_tokenizer,
        SOME[:1],
        hparams,
        context_templates=[["{}"]],
        second_moments=moments,
        targets=torch.randn(1, WIDTH),
    )
    for delta_XVK in edit.deltas.values():
        assert delta_XVK.flatten(1).any(dim=1).sum() == 2


def test_experts_may_be_named_by_their_module_or_by_its_weight() -> None:
    model = build(mixture("olmoe", **EXPERTS))
    for name in ("mlp.experts", "mlp.experts.down_proj"):
        named = {
            "layers": [0, 1],
            "layer_module_tmp": "model.layers.{}",
            "attn_module_tmp": "model.layers.{}.self_attn.o_proj",
            "rewrite_module_tmps": [f"model.layers.{{}}.{name}"],
        }
        layout = resolve(model, PMETHyperParams.from_dict(named))
        assert layout.weight_name(1) == "model.layers.1.mlp.experts.down_proj"
        assert (layout.experts, layout.value_width, layout.key_width) == (4, WIDTH, 48)


def test_experts_must_be_in_every_edited_layer() -> None:
    model = build(mixture("qwen3_moe", decoder_sparse_step=2, **EXPERTS))
    named = {"rewrite_module_tmps": ["model.layers.{}.mlp.experts"], "layers": [0, 1]}
    with pytest.raises(ArchitectureError, match=r"no module model\.layers\.0\.mlp\.experts"):
        resolve(model, PMETHyperParams.from_dict(named))
    assert resolve(model, PMETHyperParams(layers=(1, 3))).experts == 4
    assert resolve(model, PMETHyperParams(layers=(0, 2))).experts == 0
    with pytest.raises(
        ArchitectureError,
        match=r"different FFNs \(mlp\.down_proj in layer 0, mlp\.experts in layer",
    ):
        resolve(model, PMETHyperParams(layers=(0, 1)))


def test_experts_whose_keys_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bounded(self: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        return original(self, hidden, index, gates).tanh()

    # A configuration that no other test has: small copies are kept.
    own = {"rope_type": "default", "rope_theta": 7.0}
    model = build(mixture("mixtral", **LOCAL, rope_parameters=own))
    kind = type(model.model.layers[0].mlp.experts)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", bounded)
    with pytest.raises(
        ArchitectureError,
        match=r"layer 0 of \w+ sends each token to some of several experts \(mlp\.experts\) whose "
        r"keys cannot be read.* no FFN that every token passes through; edit a model with such",
    ):
        resolve(model, PMETHyperParams(layers=(0, 1)))
    named = {"rewrite_module_tmps": ["model.layers.{}.mlp.experts"], "layers": [0, 1]}
    with pytest.raises(ArchitectureError, match=r"mlp\.experts holds several experts whose keys"):
        resolve(model, PMETHyperParams.from_dict(named))


def test_a_name_that_no_module_has_is_answered_with_what_there_is() -> None:
    model = build(mixture("olmoe", **EXPERTS))
    named = {
        "layers": [0, 1],
        "layer_module_tmp": "model.layers.{}",
        "attn_module_tmp": "model.layers.{}.self_attn.o_proj",
        "rewrite_module_tmps": ["model.layers.{}.mlp.down_proj"],
    }
    with pytest.raises(
        ArchitectureError,
        match=r"no module model\.layers\.1\.mlp\.down_proj.* \(layer 1 has "
        r"self_attn\.o_proj \(mixes tokens\), mlp\.experts \(several experts\)\)",
    ):
        resolve(model, PMETHyperParams.from_dict(named))


def test_layers_with_and_without_experts_are_told_apart() -> None:
    settings = {"first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    model = build(llama_named("deepseek_v3", "", "", **settings, num_experts_per_tok=2, **LATENT))
    dense = resolve(model, PMETHyperParams(layers=(0, 1)))
    assert dense.family.down_projection == "model.layers.{}.mlp.down_proj"
    with pytest.raises(
        ArchitectureError,
        match=r"different FFNs \(mlp\.down_proj in layer 1, mlp\.shared_experts\.down_proj in "
        r"layer 2\); name layers of one kind",
    ):
        resolve(model, PMETHyperParams(layers=(1, 2)))


def test_a_last_layer_without_attention_is_edited_at_what_mixes_its_tokens() -> None:
    model = build(llama_named("qwen3_5_text", "", "", layer_types=HYBRID, **LINEAR))
    layout = resolve(model, PMETHyperParams(layers=(1, 2)))
    assert layout.family.attention_projection == "model.layers.{}.linear_attn.out_proj"


def test_a_model_of_recurrent_blocks_alone_is_refused() -> None:
    config = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 8}
    model = build(variant("mamba", "", "", "", **config))
    with pytest.raises(ArchitectureError, match=r"layer 0 of \w+ has no FFN down-projection"):
        resolve(model, PMETHyperParams(layers=(0, 1)))
