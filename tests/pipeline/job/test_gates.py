"""Gates: the requirement of each kind, and figures that could not be measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jobs.views import gate_text
from pipeline.evaluation.figures import read_gate
from pipeline.job.gates import GATES, NOTHING_LAST, UNDEFINED, outcomes

METRICS = {
    "before": {"specificity": 0.95, "fluency": 6.5, "perplexity": 10.0},
    "after": {"efficacy": 0.9, "specificity": 0.8, "fluency": 6.0, "perplexity": 10.3},
}
LAST = {"specificity": 0.85, "efficacy": 0.7, "portability": 0.5}


def outcome(key: str, threshold: float, last: Any = LAST) -> dict[str, Any]:
    (only,) = outcomes({key: threshold}, METRICS, last)
    return only


@pytest.mark.parametrize(
    ("key", "kind", "value", "least_or_most"),
    [
        ("efficacy", "least", 0.9, 0.9),
        ("fluency", "least", 6.0, 6.0),
        ("perplexity_increase", "increase", 0.03, 0.031),
        ("specificity_drop", "drop", 0.15, 0.151),
        ("fluency_drop", "drop", 0.5, 0.5),
        ("specificity_drop_since_last", "drop_since_last", 0.05, 0.051),
        ("efficacy_drop_since_last", "drop_since_last", -0.2, 0.0),
    ],
)
def test_a_gate_passes_up_to_its_threshold(
    key: str, kind: str, value: float, least_or_most: float
) -> None:
    passed = outcome(key, least_or_most)
    assert passed["name"] == key
    assert (passed["kind"], passed["threshold"]) == (kind, least_or_most)
    assert passed["value"] == pytest.approx(value)
    assert passed["passed"] is True
    worse = least_or_most + 0.002 if kind == "least" else value - 0.002
    assert outcome(key, worse)["passed"] is False


def test_the_worst_task_decides_about_single_tasks() -> None:
    metrics = {"before": {"harness": 0.6}, "after": {"harness": 0.58}}
    metrics["harness"] = {"largest_drop": 0.05}
    asked = {"harness_drop": 0.03, "harness_task_drop": 0.04, "harness": 0.5}
    mean, single, least = outcomes(asked, metrics)
    assert [mean["passed"], single["passed"], least["passed"]] == [True, False, True]
    assert (single["value"], single["kind"]) == (0.05, "most")
    assert gate_text(single) == (
        "harness_task_drop is 5.0 points below, the gate requires at most 4.0 points below the "
        "base in any task"
    )
    assert outcomes({"harness_task_drop": 0.05}, metrics)[0]["passed"] is True
    # A task without a defined drop may be anything.
    metrics["harness"] = {"largest_drop": None}
    (undefined,) = outcomes({"harness_task_drop": 1.0}, metrics)
    assert (undefined["passed"], undefined["value"]) == (False, None)


@pytest.mark.parametrize(
    "key",
    [
        *("generalization", "generalization_drop", "efficacy_drop", "agreement"),
        # The last run has the figure, this one does not.
        "portability_drop_since_last",
        # Neither run has it.
        "consistency_drop_since_last",
    ],
)
def test_what_could_not_be_measured_does_not_pass(key: str) -> None:
    gate = outcome(key, 0.0 if GATES[key].kind == "least" else 1.0)
    assert gate["value"] is None
    assert gate["passed"] is False
    assert "note" not in gate


@pytest.mark.parametrize(
    ("before", "after"),
    [(9.0, math.inf), (9.0, math.nan), (math.nan, 9.0), (math.inf, 9.0), (math.inf, math.inf)],
)
@pytest.mark.parametrize(
    "key",
    ["perplexity_increase", "fluency_drop", "fluency_drop_since_last", "fluency"],
)
def test_a_figure_that_is_not_finite_does_not_pass_and_says_why(
    key: str, before: float, after: float
) -> None:
    metric = GATES[key].figure
    metrics = {"before": {metric: before}, "after": {metric: after if key != "fluency" else before}}
    if key == "fluency":
        metrics["after"][metric] = after if not math.isfinite(after) else before
    (gate,) = outcomes({key: 9e9 if key != "fluency" else 0.0}, metrics, {metric: before})
    assert gate["passed"] is False
    assert not math.isfinite(gate["value"])
    assert gate["note"] == UNDEFINED
    assert gate_text(gate).endswith(read_gate(gate).asked)
    assert f"{key} is not a finite number, and nothing that is undefined passes" in gate_text(gate)


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_an_undefined_figure_does_not_pass_where_there_is_no_last_one_either(after: float) -> None:
    metrics = {"before": {}, "after": {"fluency": after}}
    (gate,) = outcomes({"fluency_drop_since_last": 1.0}, metrics, None)
    assert (gate["passed"], gate["note"]) == (False, UNDEFINED)


def test_a_perplexity_that_was_not_measured_does_not_pass() -> None:
    metrics = {"before": {"perplexity": 9.0}, "after": {"perplexity": None}}
    (gate,) = outcomes({"perplexity_increase": 9e9}, metrics)
    assert (gate["passed"], gate["value"]) == (False, None)


@pytest.mark.parametrize("last", [None, {}, {"fluency": None}])
def test_without_a_last_figure_there_is_nothing_to_be_worse_than(last: Any) -> None:
    gate = outcome("fluency_drop_since_last", 0.0, last)
    assert gate["value"] is None
    assert gate["passed"] is True
    assert gate["note"] == NOTHING_LAST
