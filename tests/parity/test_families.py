"""Every family of the architecture table: the fast form compared with the plain one.

The models are tiny and random. The plain form gets the names of the modules, written here by hand;
the fast one finds them itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import pmet
from pmet.hparams import PMETHyperParams
from pmet.model.architecture import resolve
from pmet.model.devices import share_out
from pmet.reference import PlainTargets, plain_deltas, plain_evaluate, plain_targets
from pmet.request import EditRequest
from pmet.update import keys
from pmet.update.key_reader import KeyReader
from tests import simulated

# Float32 sums in another order (left padding, other batch shapes, a cached prefix) move the hidden
# states by about 1e-7; five steps of Adam, whose size does not shrink with the gradient, turn that
# into some 1e-6, and into more where a component's gradient is nearly zero.
TARGET = 5e-5
# Nothing is optimised between targets and deltas: what differs is the rounding of float32 keys and
# of the weights of earlier layers, amplified by the condition of KᵀK + λC to some 1e-6.
DELTA = 2e-5

CONTEXTS = [["{}"], ["Mirk works as a botanist. {}", "Zaiter. {}", "It is said in Dokain that {}"]]
VOCABULARY = 700
WIDTH = 32
DEPTH = 4
WINDOW = 8
LAYERS = (0, 1)

# Prompts of all lengths, so that rows are padded; one starts with a subject of a single token,
# which leaves nothing before its last token in the bare context. Through two layers with a window
# of eight tokens every target must see its subject, or its gradient would be pure rounding.
REQUESTS = [
    EditRequest("{} works as", "Sur Bavov", "a glass blower"),
    EditRequest("In the guild book of the old city {} is listed as", "Traind Keabrix", "a baker"),
    EditRequest("{} is", "A", "an astronomer"),
    EditRequest("The mother tongue of {} is", "Tax Naizath", "Railish"),
    EditRequest("{}, a city in", "Drokend", "Zaiter", target_true="Dokain"),
    EditRequest("They say that {}'s trade is that of", "Drum Zeabril", "a smith"),
    EditRequest("Of Ler Caibrer's friends, {} earns a living as", "Ler Caibrer", "a stone mason"),
    EditRequest("Where is {}? In", "Tremeth upon the river Zam", "Brakark"),
    EditRequest("{} sells", "Kesear Group", "ink"),
]

HPARAMS: dict[str, Any] = {
    "layers": LAYERS,
    "v_num_grad_steps": 5,
    "v_lr": 0.5,
    "v_weight_decay": 0.02,
    "kl_factor": 0.25,
    "clamp_norm_factor": 3.0,
    "mom2_update_weight": 10.0,
}


@dataclass(frozen=True)
class Variant:
    """A model to build, with the names of its attention and FFN output modules."""

    name: str
    model_type: str
    attention: str
    ffn: str
    config: dict[str, Any]


def llama_like(name: str, model_type: str, **config: Any) -> Variant:
    """A variant with Llama's module names and grouped key-value heads."""
    common = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    attention, ffn = "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"
    return Variant(name, model_type, attention, ffn, {**common, **config})


def gpt_neox(name: str, *, parallel: bool) -> Variant:
    """GPT-NeoX with attention and FFN side by side, or one after the other."""
    return Variant(
        name,
        "gpt_neox",
        "gpt_neox.layers.{}.attention.dense",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "use_parallel_residual": parallel,
        },
    )


def falcon(name: str, **config: Any) -> Variant:
    """Falcon with the options in which its releases differ."""
    common = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    return Variant(
        name,
        "falcon",
        "transformer.h.{}.self_attention.dense",
        "transformer.h.{}.mlp.dense_4h_to_h",
        {**common, **config},
    )


GPT2_CONFIG = {"n_embd": WIDTH, "n_head": 4, "n_layer": DEPTH, "n_positions": 128}

VARIANTS = [
    Variant(
        "gpt2", "gpt2", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj", GPT2_CONFIG
    ),
    Variant(
        "gptj",
        "gptj",
        "transformer.h.{}.attn.out_proj",
        "transformer.h.{}.mlp.fc_out",
        {**GPT2_CONFIG, "rotary_dim": 4},
    ),
    Variant(
        "gpt_neo",
        "gpt_neo",
        "transformer.h.{}.attn.attention.out_proj",
        "transformer.h.{}.mlp.c_proj",
        {
            "hidden_size": WIDTH,
            "num_heads": 4,
            "num_layers": DEPTH,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], DEPTH // 2]],
            "window_size": WINDOW,
        },
    ),
    gpt_neox("gpt_neox-parallel", parallel=True),
    gpt_neox("gpt_neox-sequential", parallel=False),
    llama_like("llama", "llama"),
    llama_like("mistral", "mistral", sliding_window=None),
    llama_like("mistral-sliding", "mistral", sliding_window=WINDOW),
    llama_like("qwen2", "qwen2"),
    llama_like(
        "qwen2-sliding",
        "qwen2",
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    llama_like("qwen3", "qwen3"),
    llama_like("gemma", "gemma"),
    llama_like("gemma2", "gemma2", sliding_window=WINDOW, query_pre_attn_scalar=8),
    llama_like(
        "gemma3_text",
        "gemma3_text",
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * (DEPTH // 2),
    ),
    Variant(
        "phi",
        "phi",
        "model.layers.{}.self_attn.dense",
        "model.layers.{}.mlp.fc2",
        llama_like("", "").config,
    ),
    llama_like("phi3", "phi3"),
    llama_like("phi3-sliding", "phi3", sliding_window=WINDOW),
    Variant(
        "opt",
        "opt",
        "model.decoder.layers.{}.self_attn.out_proj",
        "model.decoder.layers.{}.fc2",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    falcon("falcon-rotary", multi_query=True, parallel_attn=True),
    falcon("falcon-alibi", alibi=True, multi_query=False, parallel_attn=False),
    falcon("falcon-grouped", new_decoder_architecture=True, num_kv_heads=2),
    Variant(
        "opt-projected",
        "opt",
        "model.decoder.layers.{}.self_attn.out_proj",
        "model.decoder.layers.{}.fc2",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
            "ffn_dim": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    llama_like("llama-eager", "llama", attn_implementation="eager"),
    llama_like("ministral", "ministral", sliding_window=WINDOW),
    llama_like("olmo", "olmo"),
    llama_like("olmo2", "olmo2"),
    llama_like(
        "granite",
        "granite",
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
    ),
    llama_like("smollm3", "smollm3", no_rope_layers=[1, 0, 1, 0]),
    llama_like("stablelm", "stablelm", partial_rotary_factor=0.25),
    Variant(
        "starcoder2",
        "starcoder2",
        "model.layers.{}.self_attn.o_proj",
        "model.layers.{}.mlp.c_proj",
        {**llama_like("", "").config, "sliding_window": None},
    ),
]

# One variant for each mechanism that could make a target depend on the others of its batch: the
# kinds of positions, of windows, of shared key-value heads, of residual streams, of attention code.
# These are computed in batches of every size; the others in batches whose last one is not full.
EVERY_SIZE = {
    "gpt2": "learned positions",
    "gptj": "rotary positions, attention and FFN side by side",
    "gpt_neo": "local attention that masks by itself",
    "llama": "grouped key-value heads",
    "mistral-sliding": "a window in every layer",
    "gemma3_text": "layers with and without a window, norms around both blocks",
    "opt-projected": "positions that the mask shifts, projected embeddings",
    "falcon-alibi": "biases instead of positions",
    "falcon-rotary": "one key-value head",
    "smollm3": "layers without positions",
    "llama-eager": "attention without a kernel",
}
BATCHES = [
    pytest.param(variant, size, id=f"{variant.name}-{size}")
    for variant in VARIANTS
    for size in ([1, 7, 64] if variant.name in EVERY_SIZE else [7])
]
assert {variant.name for variant in VARIANTS} >= EVERY_SIZE.keys()

# Every request asks for the targets of all others as well: enough prompts that no wrong logit goes
# unnoticed.
MEASURED = [
    replace(
        request,
        target_true=REQUESTS[i - 1].target_new,
        paraphrase_prompts=[REQUESTS[i - 2].text, REQUESTS[i - 3].text],
        neighborhood_prompts=[REQUESTS[i - 4].text, REQUESTS[i - 5].text, REQUESTS[i - 6].text],
    )
    for i, request in enumerate(REQUESTS)
]
FIGURES = [
    f"{name}{form}"
    for name in ("efficacy", "generalization", "specificity")
    for form in ("", "_strict")
]


@dataclass(frozen=True)
class Problem:
    """A random model, and the plain form's results for all requests."""

    model: nn.Module
    tokenizer: Any
    named: PMETHyperParams
    found: PMETHyperParams
    second_moments: dict[int, Tensor]
    targets: PlainTargets
    deltas: dict[str, Tensor]


def build(variant: Variant) -> nn.Module:
    """The variant's model with every parameter random, biases and norms too.

    Matrices keep the size of what passes through them, unlike the usual 0.02, with which a model
    this narrow would answer the same to everything.
    """
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(variant.model_type, **tokens, **variant.config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 * WIDTH**-0.5)
            else:
                weight += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def problem_of(golden_tokenizer: Any) -> Callable[[Variant], Problem]:
    """Builds a variant's problem once."""

    @cache
    def solved(name: str) -> Problem:
        variant = next(variant for variant in VARIANTS if variant.name == name)
        model = build(variant)
        found = PMETHyperParams.from_dict(HPARAMS)
        named = PMETHyperParams.from_dict(
            {**HPARAMS, "rewrite_module_tmps": [variant.ffn], "attn_module_tmp": variant.attention}
        )
        arguments = (model, golden_tokenizer, REQUESTS, named, CONTEXTS)
        targets = plain_targets(*arguments)
        moments = {}
        for layer in LAYERS:
            weight = model.get_submodule(variant.ffn.format(layer)).weight
            key_width = weight.numel() // WIDTH
            samples_NK = torch.randn(2 * key_width, key_width)
            moments[layer] = samples_NK.T @ samples_NK / len(samples_NK)
        deltas = plain_deltas(*arguments, moments, targets.values)
        return Problem(model, golden_tokenizer, named, found, moments, targets, deltas)

    return lambda variant: solved(variant.name)


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def problem(request: pytest.FixtureRequest, problem_of: Callable[[Variant], Problem]) -> Problem:
    """Each variant's problem in turn."""
    return problem_of(request.param)


def worst(actual: Tensor, expected: Tensor) -> float:
    """Largest distance of a row, relative to the expected row."""
    return float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_attention_block_may_be_named_instead_of_its_projection(variant: Variant):
    """MEMIT's files name the block, whose output is the projection's, where δ_a applies."""
    model = build(variant)
    found = resolve(model, PMETHyperParams.from_dict({"layers": LAYERS}))
    assert found.family.attention_projection == variant.attention
    layer, _, parts = variant.attention.partition("{}.")
    names = parts.split(".")
    # GPT-Neo has two blocks around its projection.
    blocks = [f"{layer}{{}}.{'.'.join(names[:end])}" for end in range(1, len(names))]
    assert blocks
    outputs: dict[str, Tensor] = {}
    for name in (variant.attention, *blocks):
        hparams = PMETHyperParams.from_dict({"layers": LAYERS, "attn_module_tmp": name})
        assert resolve(model, hparams) == found
        model.get_submodule(name.format(0)).register_forward_hook(partial(_keep, outputs, name))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert all(torch.equal(outputs[block], outputs[variant.attention]) for block in blocks)


def _keep(outputs: dict[str, Tensor], name: str, _module: nn.Module, _given: Any, output: Any):
    outputs[name] = output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("problem", "batch_size"), BATCHES, indirect=["problem"])
def test_targets_do_not_depend_on_what_is_computed_together(problem: Problem, batch_size: int):
    order = list(range(len(REQUESTS)))
    random.Random(batch_size).shuffle(order)
    fast = pmet.compute_targets(
        problem.model,
        problem.tokenizer,
        [REQUESTS[i] for i in order],
        problem.found,
        context_templates=CONTEXTS,
        batch_size=batch_size,
    )
    assert fast.steps.tolist() == problem.targets.steps[order].tolist()
    assert worst(fast.values, problem.targets.values[order]) <= TARGET
    assert torch.allclose(fast.losses, problem.targets.losses[order], rtol=TARGET, atol=TARGET)


def assert_deltas_are_those_of_the_plain_form(problem: Problem) -> None:
    edit = pmet.compute_edit(
        problem.model,
        problem.tokenizer,
        REQUESTS,
        problem.found,
        context_templates=CONTEXTS,
        second_moments=problem.second_moments,
        targets=problem.targets.values,
    )
    assert edit.deltas.keys() == problem.deltas.keys()
    for name, expected in problem.deltas.items():
        assert (edit.deltas[name].double() - expected).norm() <= DELTA * expected.norm(), name


def test_deltas_are_those_of_the_plain_form(problem: Problem):
    assert_deltas_are_those_of_the_plain_form(problem)


def test_deltas_do_not_depend_on_how_keys_are_read(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
):
    """In passes that run to the end, as ZeRO-3 requires, with few requests at a time and all hidden
    states in a file between the passes.
    """
    monkeypatch.setattr(keys, "KEY_BATCH", 2)
    read = []

    class Reader(KeyReader):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, whole_passes=True, memory=0)
            read.append(self)

    monkeypatch.setattr("pmet.edit.reader_kind", lambda *_: Reader)
    head = problem.model.get_output_embeddings()
    assert_deltas_are_those_of_the_plain_form(problem)
    assert problem.model.get_output_embeddings() is head
    assert len(read) == 1


def test_scores_are_those_of_the_plain_form(problem: Problem):
    arguments = (problem.model, problem.tokenizer, MEASURED)
    fast, plain = pmet.evaluate(*arguments), plain_evaluate(*arguments)
    for mine, reference in zip([fast, *fast["rows"]], [plain, *plain["rows"]], strict=True):
        # Fractions of a few prompts: equal except for the order of summation.
        expected = [reference[name] for name in FIGURES]
        assert [mine[name] for name in FIGURES] == pytest.approx(expected, abs=1e-12)
    assert len({row["specificity"] for row in plain["rows"]}) > 1


def test_the_optimisation_moves_every_target(problem: Problem):
    """Otherwise equal targets would prove little: both forms could just read the clean values."""
    once = problem.named.model_copy(update={"v_num_grad_steps": 1})
    clean = plain_targets(problem.model, problem.tokenizer, REQUESTS, once, CONTEXTS)
    moved_E = (problem.targets.values - clean.values).norm(dim=1) / clean.values.norm(dim=1)
    assert moved_E.min() >= 0.1
    assert problem.targets.losses.mean() <= clean.losses.mean() - 0.1
    assert (problem.targets.steps == HPARAMS["v_num_grad_steps"]).all()


def test_a_model_on_several_devices_does_the_same(problem: Problem):
    some = slice(0, 4)
    with simulated.devices(3) as devices:
        model = share_out(deepcopy(problem.model), devices)
        assert {weight.device for weight in model.parameters()} == set(devices)
        arguments = (model, problem.tokenizer)
        targets = pmet.compute_targets(
            *arguments, REQUESTS[some], problem.found, context_templates=CONTEXTS
        )
        edit = pmet.compute_edit(
            *arguments,
            REQUESTS,
            problem.found,
            context_templates=CONTEXTS,
            second_moments=problem.second_moments,
            targets=problem.targets.values,
        )
        rows = pmet.evaluate(*arguments, MEASURED)["rows"]
    assert targets.steps.tolist() == problem.targets.steps[some].tolist()
    assert worst(targets.values, problem.targets.values[some]) <= TARGET
    for name, expected in problem.deltas.items():
        assert (edit.deltas[name].double() - expected).norm() <= DELTA * expected.norm(), name
    plain = plain_evaluate(problem.model, problem.tokenizer, MEASURED)["rows"]
    for mine, reference in zip(rows, plain, strict=True):
        expected = [reference[name] for name in FIGURES]
        assert [mine[name] for name in FIGURES] == pytest.approx(expected, abs=1e-12)
