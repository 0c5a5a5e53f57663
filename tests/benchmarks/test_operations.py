"""The arithmetic that targets need, by formula, against what a counter sees when they are found."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operations import needed
from pmet.request import EditRequest
from pmet.targets import compute_targets
from tests.conftest import FAMILIES, Golden, load_golden

REQUESTS = 2
# Counted but not needed: the rows of a request are padded to one length, and the beginnings of
# contexts, which the formula leaves out because all requests share them, are run for each batch.
# In larger batches padding adds more, so requests are counted one at a time.
BEYOND = 0.15
# An evaluation is counted the same for every family, though their code skips or pads a little.
EACH = 0.05


def _hard(golden: Golden) -> list[EditRequest]:
    """The requests whose optimisation does not stop early."""
    pairs = zip(golden.requests, golden.expected["steps"].tolist(), strict=True)
    return [request for request, steps in pairs if steps == golden.hparams.v_num_grad_steps]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_agrees_with_a_counter(family: str) -> None:
    golden = load_golden(family)
    requests = _hard(golden)[:REQUESTS]
    what = (golden.model, golden.tokenizer, requests, golden.hparams)
    templates = golden.context_templates
    with FlopCounterMode(display=False) as counter:
        found = compute_targets(*what, context_templates=templates, batch_size=1)
    formula = needed(*what, templates, found.steps.tolist())
    assert formula <= counter.get_total_flops() <= (1 + BEYOND) * formula


@pytest.mark.parametrize("family", FAMILIES)
def test_a_further_evaluation_costs_what_the_counter_sees(family: str) -> None:
    """Without what is computed once: the difference between 10 and 5 evaluations."""
    golden = load_golden(family)
    request = _hard(golden)[:1]
    counted, formula = [], []
    for evaluations in (5, 10):
        hparams = golden.hparams.model_copy(update={"v_num_grad_steps": evaluations})
        what = (golden.model, golden.tokenizer, request, hparams)
        with FlopCounterMode(display=False) as counter:
            found = compute_targets(*what, context_templates=[["{}"]], batch_size=1)
        assert torch.equal(found.steps, torch.tensor([evaluations]))
        counted.append(counter.get_total_flops())
        formula.append(needed(*what, [["{}"]], [evaluations]))
    each, seen = formula[1] - formula[0], counted[1] - counted[0]
    assert each == pytest.approx(seen, rel=EACH)
