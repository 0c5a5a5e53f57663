"""Scores of tasks, and their comparison."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pipeline.harness.scores import (
    TaskScores,
    alone,
    compared,
    interval_of_mean,
    largest_drop,
    mean_of,
)


def scores(name: str = "owls", right: int = 8, of: int = 10, **changed: Any) -> TaskScores:
    values = [1.0] * right + [0.0] * (of - right)
    own = TaskScores(name, "acc", True, right / of, values, of, 0, {"acc": right / of})
    return replace(own, **changed)


PERPLEXITY: dict[str, Any] = {"metric": "perplexity", "higher_is_better": False, "values": None}


def test_scores_survive_a_file() -> None:
    assert TaskScores.from_json(json.loads(json.dumps(scores().as_json()))) == scores()


def test_tasks_of_a_group_count_by_their_documents() -> None:
    joined = TaskScores.joined("birds", [scores(right=8), scores("herons", right=0, of=30)])
    assert joined is not None
    assert (joined.name, joined.value, joined.documents) == ("birds", 0.2, 40)
    assert TaskScores.joined("birds", [scores(), scores(metric="f1")]) is None
    assert TaskScores.joined("birds", [scores(), scores(**PERPLEXITY)]) is None


def test_in_the_mean_each_task_counts_the_same() -> None:
    both = [scores(right=8), scores("herons", right=0, of=30), scores(**PERPLEXITY)]
    assert mean_of(both) == pytest.approx(0.4)
    low, high = interval_of_mean(both) or (0, 0)
    assert low < 0.4 < high
    assert mean_of([scores(**PERPLEXITY)]) is None
    assert interval_of_mean([scores(**PERPLEXITY)]) is None


def test_a_drop_is_absolute_for_fractions_and_relative_for_others() -> None:
    lower = [scores(value=20.0, **PERPLEXITY), scores(value=25.0, **PERPLEXITY)]
    higher = [scores(value=40.0, values=None), scores(value=30.0, values=None)]
    found = [
        compared([base], [edited])[0]
        for base, edited in ([scores(right=8), scores(right=7)], lower, higher)
    ]
    assert [row["drop"] for row in found] == pytest.approx([0.1, 0.25, 0.25])
    assert [row["difference"] for row in found] == pytest.approx([-0.1, 5.0, -10.0])
    assert largest_drop(found) == pytest.approx(0.25)
    low, high = found[0]["interval"]
    assert low < -0.1 < high
    assert found[1]["interval"] is None


def test_an_undefined_score_has_no_drop() -> None:
    rows = compared([scores(), scores()], [scores(), scores(value=math.nan)])
    assert (rows[0]["drop"], rows[1]["drop"]) == (0.0, None)
    assert largest_drop(rows) is None
    ruined = scores(value=math.nan, values=[1.0, math.nan])
    assert math.isnan(mean_of([scores("herons"), ruined]) or 0)
    assert interval_of_mean([scores("herons"), ruined]) is None
    assert largest_drop([]) is None


def test_one_model_has_intervals_of_its_own() -> None:
    (row,) = alone([scores()])
    low, high = row["interval"]
    assert low < row["after"] == 0.8 < high
    assert "before" not in row
