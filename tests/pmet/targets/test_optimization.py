"""Batches of targets: entering, leaving, memory limits and progress reports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pmet
from pmet.errors import ArchitectureError, OutOfMemoryError
from pmet.model import module_overrides
from pmet.reference import plain_targets
from pmet.targets import optimization, suffix
from tests.conftest import Golden, load_golden

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def gpt2() -> Golden:
    return load_golden("gpt2")


@pytest.fixture(scope="module")
def llama() -> Golden:
    """A problem in which some optimisations stop early, at the first evaluation or later."""
    return load_golden("llama")


def compute(golden: Golden, **how: Any) -> pmet.Targets:
    return pmet.compute_targets(
        golden.model,
        golden.tokenizer,
        golden.requests,
        golden.hparams,
        context_templates=golden.context_templates,
        **how,
    )


def distances(found: pmet.Targets, expected: pmet.Targets) -> torch.Tensor:
    return (found.values - expected.values).norm(dim=1) / expected.values.norm(dim=1)


@pytest.fixture(scope="module")
def reference(gpt2: Golden) -> pmet.Targets:
    return compute(gpt2)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of requests in the batch at each evaluation."""
    seen: list[int] = []
    original = optimization._Optimisation._advance

    def advance(self: Any) -> Any:
        seen.append(len(self._members))
        return original(self)

    monkeypatch.setattr(optimization._Optimisation, "_advance", advance)
    return seen


def test_the_next_request_takes_the_place_of_one_that_has_stopped(llama: Golden, sizes: list[int]):
    told: list[tuple[int, int]] = []
    found = compute(llama, batch_size=4, on_progress=lambda *counts: told.append(counts))
    assert max(sizes) == 4
    steps = found.steps.tolist()
    assert sum(sizes) == sum(steps)
    # Graham's bound for list scheduling; six batches that each run until their slowest request
    # stops exceed it.
    assert len(sizes) <= sum(steps) / 4 + max(steps)
    # Progress reports every request once, and early stops.
    assert sum(count for count, _ in told) == len(llama.requests)
    early = int((found.steps < llama.hparams.v_num_grad_steps).sum())
    assert 0 < early < len(llama.requests)
    assert sum(number for _, number in told) == early


def test_no_requests_give_no_targets(gpt2: Golden):
    found = pmet.compute_targets(
        gpt2.model, gpt2.tokenizer, [], gpt2.hparams, context_templates=gpt2.context_templates
    )
    assert found.values.shape == (0, 64)
    assert len(found) == 0


@pytest.mark.parametrize("enough", [0.0, 2.0], ids=["padding is computed", "padding is left out"])
def test_leaving_padding_out_changes_nothing(
    golden: Golden, enough: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module_overrides, "_ENOUGH_TOKENS", enough)
    found = compute(golden, batch_size=64)
    expected = golden.expected
    assert found.steps.tolist() == expected["steps"].tolist()
    distance_E = (found.values - expected["targets"]).norm(dim=1) / expected["targets"].norm(dim=1)
    assert distance_E.median() <= 2e-5


def test_the_last_layer_can_be_the_target_layer(gpt2: Golden):
    depth = gpt2.model.config.num_hidden_layers
    hparams = gpt2.hparams.model_copy(update={"layers": [depth - 2, depth - 1]})
    # That layer's output can change the answer only if it directly follows the subject.
    requests = [
        pmet.EditRequest(f"{front} {{}}".strip(), subject, target)
        for front in ("", "They all know", "In the guild book:")
        for subject, target in (("Sur Bavov", "a glass blower"), ("Drokend", "Zaiter"))
    ]
    what = (gpt2.model, gpt2.tokenizer, requests, hparams)
    plain = plain_targets(*what, gpt2.context_templates)
    found = pmet.compute_targets(*what, context_templates=gpt2.context_templates)
    assert found.steps.tolist() == plain.steps.tolist()
    assert ((found.values - plain.values).norm(dim=1) / plain.values.norm(dim=1)).max() <= 1e-3


def exhausted_above(rows: int, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> list[int]:
    """Make evaluations of more rows fail after ``after`` successful ones, as on a full GPU."""
    seen: list[int] = []
    original = suffix.SuffixRun.logits

    def logits(self: Any, attention: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(attention) > rows and len(seen) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        seen.append(len(attention))
        return original(self, attention, *rest)

    monkeypatch.setattr(suffix.SuffixRun, "logits", logits)
    return seen


@pytest.mark.parametrize("after", [0, 6])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    gpt2: Golden, reference: pmet.Targets, after: int, monkeypatch: pytest.MonkeyPatch
):
    seen = exhausted_above(24, monkeypatch, after)
    found = compute(gpt2, batch_size=24)
    assert max(seen[after:]) <= 24
    assert (max(seen) > 24) == bool(after)
    # A removed request resumes where it stopped: no step is repeated or skipped.
    assert found.steps.tolist() == reference.steps.tolist()
    assert distances(found, reference).median() <= 2e-5
    assert (distances(found, reference) <= 1e-3).sum() >= 22


def test_one_request_too_large_for_memory_is_an_error_that_says_so(
    gpt2: Golden, monkeypatch: pytest.MonkeyPatch
):
    exhausted_above(3, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"memory cannot hold one request of [67] prompts"):
        compute(gpt2, batch_size=8)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(
    gpt2: Golden, monkeypatch: pytest.MonkeyPatch
):
    def logits(*_: Any) -> torch.Tensor:
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(suffix.SuffixRun, "logits", logits)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        compute(gpt2)


def test_an_attention_that_changes_what_it_projects_is_refused(gpt2: Golden):
    layer = gpt2.model.transformer.h[gpt2.hparams.target_layer]
    handle = layer.attn.register_forward_hook(lambda _m, _a, out: (2 * out[0], *out[1:]))
    try:
        with pytest.raises(ArchitectureError, match="attn_module_tmp"):
            compute(gpt2)
    finally:
        handle.remove()


def test_bfloat16_weights_keep_free_vectors_and_losses_in_float32(gpt2: Golden):
    model = type(gpt2.model)(gpt2.model.config)
    model.load_state_dict(gpt2.model.state_dict())
    found = pmet.compute_targets(
        model.to(torch.bfloat16).eval(),
        gpt2.tokenizer,
        gpt2.requests,
        gpt2.hparams,
        context_templates=gpt2.context_templates,
    )
    assert found.values.dtype == torch.float32
    # A sum v + δ of 16-bit numbers would itself be one.
    assert (found.values.to(torch.bfloat16).float() != found.values).any()
    expected = gpt2.expected["targets"]
    # Eight bits of mantissa: activations differ by 4e-3, and optimisations stop elsewhere.
    assert ((found.values - expected).norm(dim=1) / expected.norm(dim=1)).median() <= 0.2


MEMORY = """
import os, resource, sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
import pmet, pmet.targets.optimization as optimization
torch.set_num_threads(1)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=700, max_position_embeddings=1024)).eval()
hparams = pmet.PMETHyperParams.from_dict(dict(
    layers=[1, 2], clamp_norm_factor=2, v_num_grad_steps=3, v_lr=0.2, v_weight_decay=0.1,
    kl_factor=1, mom2_update_weight=10))
templates = [["{}"], ["The river is long. {}", "A man said that {}"]]
words = " water" * 160
requests = [pmet.EditRequest("The capital of {} is", f"Land{i}", "Rome") for i in range(24)]
requests += [pmet.EditRequest(words + " and {} is", f"Land{i}", "Rome") for i in range(3)]
requests += [pmet.EditRequest("{} and" + words + " is", f"Land{i}", "Rome") for i in range(3)]
lengths = [len(tokenizer(r.text)["input_ids"]) for r in requests]
what = (model, tokenizer), dict(hparams=hparams, context_templates=templates)
pmet.compute_targets(*what[0], requests[:1], **what[1], batch_size=1)
sizes, advance = [], optimization._Optimisation._advance
def counted(self):
    sizes.append(len(self._members))
    return advance(self)
optimization._Optimisation._advance = counted
def measure(budget):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = pmet.compute_targets(*what[0], requests, **what[1], memory=budget << 20)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    said = min(lengths), max(lengths), grown >> 10, max(sizes), len(sizes), len(found.failures)
    print(*said, flush=True)
# A process for each budget, because a peak stays; forked, because the imports take seconds.
for budget in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        measure(budget)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="maximum resident size is in KiB on Linux")
def test_batches_picked_by_memory_stay_within_it_with_short_and_long_prompts():
    evaluations, budgets = [], (400, 1500)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(ROOT / "tests/golden/gpt2/model"), *map(str, budgets)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    for budget, line in zip(budgets, done.stdout.splitlines(), strict=True):
        shortest, longest, grown, largest, count, failures = map(int, line.split())
        assert shortest <= 12
        assert longest >= 480
        assert grown <= budget
        # The short ones run together; the memory of the long ones is known before they enter.
        assert largest >= 24
        assert not failures
        evaluations.append(count)
    # More memory is used.
    assert evaluations[1] < 0.8 * evaluations[0]


def several_facts() -> list[pmet.EditRequest]:
    """Three facts of a subject, and two of another, that share a key; and four that do not."""
    return [
        pmet.EditRequest("They say {} works as", "Sur Bavov", "a glass blower"),
        pmet.EditRequest("They say {} lives in", "Drokend", "Zaiter"),
        pmet.EditRequest("They say {} lives in the city of", "Sur Bavov", "Drokend"),
        pmet.EditRequest("In truth {} lives in", "Sur Bavov", "Zaiter"),
        pmet.EditRequest("They say {} is", "Sur Bavov", "a baker"),
        pmet.EditRequest("They say {} is", "Drokend", "a town of glass"),
        pmet.EditRequest("{} works as", "Sur Bavov", "a baker"),
        pmet.EditRequest("They say {} works as", "Zul Lodreal", "a glass blower"),
        # The same tokens as the first, but the KL prompt has another subject.
        pmet.EditRequest("They say Sur {} works as", "Bavov", "a baker"),
    ]


GROUPS = [[0, 2, 4], [1, 5], [3], [6], [7], [8]]


def few_steps(golden: Golden) -> tuple[Any, ...]:
    """So few steps that no optimisation amplifies rounding."""
    hparams = golden.hparams.model_copy(update={"v_num_grad_steps": 8})
    return golden.model, golden.tokenizer, several_facts(), hparams


def test_requests_that_share_a_key_get_the_plain_form_s_one_target(golden: Golden) -> None:
    what = few_steps(golden)
    plain = plain_targets(*what, golden.context_templates)
    told: list[int] = []
    found = pmet.compute_targets(
        *what,
        context_templates=golden.context_templates,
        batch_size=3,
        on_progress=lambda count, _: told.append(count),
    )
    assert found.steps.tolist() == plain.steps.tolist()
    distance_E = (found.values - plain.values).norm(dim=1) / plain.values.norm(dim=1)
    assert distance_E.median() <= 2e-5
    assert distance_E.max() <= 1e-3
    assert sorted(told) == [1, 1, 1, 1, 2, 3]
    for group in GROUPS:
        assert all(torch.equal(found.values[e], found.values[group[0]]) for e in group)
    assert len(found.values.unique(dim=0)) == len(GROUPS)


def test_as_published_each_request_gets_its_own_target(gpt2: Golden) -> None:
    what = few_steps(gpt2)
    templates = gpt2.context_templates
    found = pmet.compute_targets(*what, context_templates=templates, shared_keys="mean")
    plain = plain_targets(*what, templates, shared_keys="mean")
    assert found.steps.tolist() == plain.steps.tolist()
    assert len(found.values.unique(dim=0)) == len(what[2])
    joint = pmet.compute_targets(*what, context_templates=templates)
    alone = [group[0] for group in GROUPS if len(group) == 1]
    assert (distances(joint, found)[alone] <= 1e-3).all()
    assert (distances(joint, found)[GROUPS[0]] > 0.05).any()


def test_requests_without_siblings_get_the_same_bits_under_both_settings(llama: Golden) -> None:
    joint, mean = (compute(llama, shared_keys=setting) for setting in ("joint", "mean"))
    assert torch.equal(joint.values, mean.values)
    assert torch.equal(joint.losses, mean.losses)
