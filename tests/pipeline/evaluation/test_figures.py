"""Names, units and meanings of figures; gates in words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.evaluation.figures import (
    FIGURES,
    figure_of,
    measured,
    read_gate,
    show,
    show_change,
    show_interval,
)
from pipeline.job.gates import GATES
from pmet.evaluation.figures import METRICS, OF_CORPUS, OF_TEXT


def test_every_figure_that_is_measured_has_a_name_and_a_meaning() -> None:
    for name in (*METRICS, *OF_TEXT, *OF_CORPUS, "score"):
        assert FIGURES[name].meaning.endswith("."), name


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("efficacy", 0.98765, "98.8 %"),
        ("efficacy", 0, "0.0 %"),
        ("fluency", 6.0, "6.00 bits"),
        ("perplexity", 1234.6, "1,235"),
        ("perplexity", 2.2347, "2.235"),
        ("something new", 0.5, "0.5"),
        *(("efficacy", nothing, "–") for nothing in (None, True, "0.5", [])),
        ("efficacy", math.nan, "undefined"),
        ("perplexity", math.inf, "∞"),
        ("fluency", -math.inf, "−∞"),
    ],
)
def test_values_are_shown_in_their_unit(name: str, value: Any, shown: str) -> None:
    assert show(value, name) == shown


@pytest.mark.parametrize(
    ("name", "after", "before", "shown"),
    [
        ("efficacy", 0.9, 0.95, "−5.0 points"),
        ("perplexity", 20.4, 20.0, "+2.00 %"),
        ("perplexity", 20.4, 0.0, "+20.4"),
        ("fluency", 5.9, 6.0, "−0.10 bits"),
        ("something new", 1.5, 1.0, "+0.5"),
        ("efficacy", 0.9, None, "–"),
    ],
)
def test_changes_are_in_points_or_relative(name: str, after: Any, before: Any, shown: str) -> None:
    assert show_change(after, before, name) == shown


def test_an_interval_that_is_none_is_not_shown() -> None:
    assert show_interval([0.25, 0.5], "efficacy") == "25.0 to 50.0"
    assert show_interval([5.75, 6.0], "fluency") == "5.75 to 6"
    for nothing in (None, [], [0.1], [0.1, None], "ab", [0.1, 0.2, 0.3]):
        assert show_interval(nothing, "efficacy") == ""


def test_figures_stand_in_the_order_that_people_read() -> None:
    scores = {"zzz": 1.0, "perplexity": 3.0, "efficacy": 0.5, "fluency": None, "aaa": 2.0}
    assert [f.name for f in measured(scores)] == ["efficacy", "perplexity", "aaa", "zzz"]
    assert [f.name for f in measured({}, always=("score",))] == ["score"]
    assert figure_of("aaa_bbb").label == "aaa bbb"
    assert figure_of("portability_strict").label == "portability (strict)"


@pytest.mark.parametrize("key", GATES)
def test_every_gate_that_a_job_may_ask_for_is_put_in_words(key: str) -> None:
    gate = GATES[key]
    outcome = gate.outcome(0.25, {"before": {}, "after": {}}, None)
    text = read_gate(outcome)
    assert (text.name, text.figure) == (key, gate.figure)
    below = {"drop": "below the base", "drop_since_last": "below the last run"}
    ending = {"least": "", "most": "", "increase": "over the base", **below}[gate.kind]
    assert text.asked.startswith("at least" if gate.kind == "least" else "at most")
    assert text.asked.endswith(ending)


def test_gates_of_earlier_runs_are_read() -> None:
    rest = {"threshold": 0.05, "value": 0.08, "passed": False}
    older = read_gate({"metric": "specificity_drop", **rest})
    assert older == read_gate({"name": "specificity_drop", **rest})
    assert older.asked == "at most 5.0 points below the base"


def test_a_gate_that_had_nothing_to_compare_with_says_so() -> None:
    gate = GATES["efficacy_drop_since_last"].outcome(0.1, {"after": {"efficacy": 1.0}}, None)
    assert read_gate(gate).reached == "nothing to compare with"
