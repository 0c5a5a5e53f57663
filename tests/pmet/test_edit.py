"""`compute_edit`: the model stays as it was, and mismatches are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pmet import (
    Edit,
    EditRequest,
    InputError,
    NotFiniteError,
    NotPositiveDefiniteError,
    Targets,
    compute_edit,
    evaluate,
)
from pmet.reference import plain_deltas
from tests.conftest import Golden, load_golden

DELTA = 2e-4


def edit(golden: Golden, **changes: object) -> Edit:
    arguments = {
        "context_templates": golden.context_templates,
        "second_moments": golden.second_moments,
        "targets": golden.expected["targets"],
    }
    return compute_edit(
        golden.model, golden.tokenizer, golden.requests, golden.hparams, **arguments | changes
    )


def plain_edit(golden: Golden) -> dict[str, torch.Tensor]:
    return plain_deltas(
        golden.model,
        golden.tokenizer,
        golden.requests,
        golden.hparams,
        golden.context_templates,
        golden.second_moments,
        golden.expected["targets"],
    )


def test_the_model_is_left_as_it_was(golden: Golden) -> None:
    golden.model.train()
    before = {n: p.detach().clone() for n, p in golden.model.named_parameters()}
    found = edit(golden)
    assert golden.model.training
    golden.model.eval()
    for name, parameter in golden.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    assert set(found.deltas) == {n for n in before if any(n in k for k in found.originals)}
    for name, delta in found.deltas.items():
        assert delta.shape == before[name].shape
        assert delta.dtype == torch.float64


def test_the_model_is_left_as_it_was_when_the_solve_fails(golden: Golden) -> None:
    before = {n: p.detach().clone() for n, p in golden.model.named_parameters()}
    last = golden.hparams.target_layer
    broken = {**golden.second_moments, last: -1e9 * golden.second_moments[last]}
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite"):
        edit(golden, second_moments=broken)
    assert all(torch.equal(p, before[n]) for n, p in golden.model.named_parameters())


def test_the_model_is_left_as_it_was_when_an_edited_weight_overflows(golden: Golden) -> None:
    before = {n: p.detach().clone() for n, p in golden.model.named_parameters()}
    huge = torch.full_like(golden.expected["targets"], 1e200, dtype=torch.float64)
    with pytest.raises(NotFiniteError, match="does not fit its dtype, float32: the largest"):
        edit(golden, targets=huge)
    assert all(torch.equal(p, before[n]) for n, p in golden.model.named_parameters())


@pytest.mark.parametrize("spread", ["linear", "none"])
def test_the_residual_is_spread_as_the_plain_form_spreads_it(spread: str) -> None:
    published = load_golden("llama")
    hparams = published.hparams.model_copy(update={"spread": spread})
    golden = replace(published, hparams=hparams)
    plain = plain_edit(golden)
    found, as_published = edit(golden).deltas, edit(published).deltas
    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        assert (found[name] - expected).norm() <= DELTA * expected.norm(), name
        # Every layer's Δ depends on the spread: the last one's through those below it.
        assert (found[name] - as_published[name]).norm() > 0.05 * expected.norm(), name


@pytest.mark.parametrize(("family", "share"), [("gpt2", None), ("llama", 0.05)])
def test_further_solves_take_up_what_is_left_as_in_the_plain_form(
    family: str, share: float | None
) -> None:
    published = load_golden(family)
    update = {"solves": 2, "spread": "linear", "mom2_update_share": share}
    hparams = published.hparams.model_copy(update=update)
    golden = replace(published, hparams=hparams)
    plain = plain_edit(golden)
    found = edit(golden)
    assert found.deltas.keys() == plain.keys()
    for name, expected in plain.items():
        assert (found.deltas[name] - expected).norm() <= DELTA * expected.norm(), name
    # What the edited model still lacks of the targets is less than after one solve.
    once = edit(replace(golden, hparams=hparams.model_copy(update={"solves": 1})))
    assert lacking(golden, found) < 0.9 * lacking(golden, once)


def lacking(golden: Golden, found: Edit) -> float:
    """The norm of the residuals that an edit leaves."""
    found.apply(golden.model)
    try:
        again = edit(golden).deltas
    finally:
        found.revert(golden.model)
    return math.hypot(*(delta.norm().item() for delta in again.values()))


def test_requests_in_another_order_give_the_same_edit(golden: Golden) -> None:
    order = torch.randperm(len(golden.requests), generator=torch.Generator().manual_seed(0))
    shuffled = compute_edit(
        golden.model,
        golden.tokenizer,
        [golden.requests[i] for i in order.tolist()],
        golden.hparams,
        context_templates=golden.context_templates,
        second_moments=golden.second_moments,
        targets=golden.expected["targets"][order],
    )
    for name, delta in edit(golden).deltas.items():
        # Other requests in a batch mean other padding, and so other rounding of float32 keys.
        assert torch.linalg.norm(shuffled.deltas[name] - delta) <= 1e-5 * torch.linalg.norm(delta)


def test_templates_and_moments_are_made_if_not_given() -> None:
    # One family: what each family generates and sums is tested where that is done.
    golden = load_golden("gpt2")
    first = edit(golden, context_templates=None, second_moments=None)
    again = edit(golden, context_templates=None, second_moments=None)
    for name, delta in first.deltas.items():
        assert torch.equal(delta, again.deltas[name])
    # The two edits may differ in the answers to two of the 24 requests.
    assert abs(answered(golden, first) - answered(golden, edit(golden))) <= 2 / 24


def answered(golden: Golden, found: Edit) -> float:
    """Share of the requests that the edited model answers greedily."""
    found.apply(golden.model)
    try:
        return evaluate(golden.model, golden.tokenizer, golden.requests)["efficacy_strict"]
    finally:
        found.revert(golden.model)


def test_what_does_not_fit_is_named(golden: Golden) -> None:
    width = golden.model.config.hidden_size
    layer = golden.hparams.layers[0]
    with pytest.raises(InputError, match=f"lacks layer {layer}"):
        edit(golden, second_moments={})
    with pytest.raises(InputError, match="belongs to another model"):
        edit(golden, second_moments=dict.fromkeys(golden.hparams.layers, torch.eye(3)))
    with pytest.raises(InputError, match=rf"not \(24, {width}\)"):
        edit(golden, targets=torch.zeros(3, width))
    values = golden.expected["targets"]
    bad = values.clone()
    bad[2, 5] = torch.nan
    with pytest.raises(NotFiniteError, match=r"requests \[2\]"):
        edit(golden, targets=bad)
    failed = Targets(values, values[:, 0], values[:, 0], {7: "the loss is nan"})
    with pytest.raises(NotFiniteError, match="request 7: the loss is nan"):
        edit(golden, targets=failed)
    with pytest.raises(InputError, match="no edit requests"):
        compute_edit(golden.model, golden.tokenizer, [], golden.hparams)
    long = EditRequest("{} " + "and so on " * 100, "Sur Bavov", "a baker")
    with pytest.raises(InputError, match="the model reads 128; shorten it"):
        compute_edit(golden.model, golden.tokenizer, [long], golden.hparams)
