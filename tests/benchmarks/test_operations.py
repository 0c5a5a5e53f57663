"""The arithmetic that targets need, by formula, against what a counter sees when they are found."""

from __future__ import annotations

import pytest
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
