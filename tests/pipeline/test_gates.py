"""Gates: what each kind asks, and what becomes of what could not be measured."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.gates import GATES, NOTHING_LAST, outcomes

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
    assert passed["metric"] == key
    assert (passed["kind"], passed["threshold"]) == (kind, least_or_most)
    assert passed["value"] == pytest.approx(value)
    assert passed["passed"] is True
    worse = least_or_most + 0.002 if kind == "least" else value - 0.002
    assert outcome(key, worse)["passed"] is False


@pytest.mark.parametrize(
    "key",
    [
        *("generalization", "generalization_drop", "efficacy_drop", "agreement"),
        # The last run had it, this one has not.
        "portability_drop_since_last",
        # Neither has it.
        "consistency_drop_since_last",
    ],
)
def test_what_could_not_be_measured_does_not_pass(key: str) -> None:
    gate = outcome(key, 0.0 if GATES[key].kind == "least" else 1.0)
    assert gate["value"] is None
    assert gate["passed"] is False
    assert "note" not in gate


def test_a_ruined_models_perplexity_does_not_pass() -> None:
    for after in (None, float("inf"), float("nan")):
        metrics = {"before": {"perplexity": 9.0}, "after": {"perplexity": after}}
        (gate,) = outcomes({"perplexity_increase": 9e9}, metrics)
        assert gate["passed"] is False
        # JSON has no word for what is not finite.
        assert gate["value"] is None


@pytest.mark.parametrize("last", [None, {}, {"fluency": None}])
def test_without_a_last_figure_there_is_nothing_to_be_worse_than(last: Any) -> None:
    gate = outcome("fluency_drop_since_last", 0.0, last)
    assert gate["value"] is None
    assert gate["passed"] is True
    assert gate["note"] == NOTHING_LAST
