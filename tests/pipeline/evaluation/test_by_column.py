"""Figures grouped by a column."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.evaluation import by_column
from pipeline.evaluation.by_column import group_column, grouped
from pmet.evaluation.figures import METRICS


def figures(efficacy: float) -> dict[str, object]:
    return dict.fromkeys(METRICS) | {"efficacy": efficacy, "efficacy_prompts": 1}


def test_the_column_is_the_one_asked_for_or_the_usual_one() -> None:
    assert group_column("country", ["relation", "country"]) == "country"
    assert group_column(None, ["relation", "relation_id"]) == "relation_id"
    assert group_column(None, ["prompt", "relation"]) == "relation"
    assert group_column(None, ["prompt"]) is None
    with pytest.raises(
        JobError, match=r"evaluate\.group_by: the requests have no column 'x'; they"
    ):
        group_column("x", ["prompt", "relation"])


def test_the_largest_group_comes_first_with_figures_of_its_own() -> None:
    table = pa.table({"relation": ["a", "b", None, "b", "c", "b"]})
    rows = [0, 1, 2, 3, 5]
    before = {row: figures(0.0) for row in rows}
    after = {row: figures(float(row != 3)) for row in rows}
    found = grouped("relation", table, rows, {"before": before, "after": after})
    assert found is not None
    assert found["column"] == "relation"
    assert [(g["name"], g["requests"]) for g in found["rows"]] == [("b", 3), ("a", 1), ("–", 1)]
    largest = found["rows"][0]
    assert largest["before"]["efficacy"] == 0.0
    assert largest["after"]["efficacy"] == pytest.approx(2 / 3)
    low, high = largest["intervals"]["after"]["efficacy"]
    assert low < 2 / 3 < high
    assert largest["intervals"]["before"].keys() == {"efficacy"}


def test_too_many_groups_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_column, "MOST", 2)
    table = pa.table({"relation_id": [9, 8, 8, 7]})
    found = grouped("relation_id", table, range(4), {"after": {}})
    assert found is not None
    assert [g["name"] for g in found["rows"]] == ["8", "7"]
    assert found["left_out"] == 1
    assert grouped(None, table, range(4), {}) is None
