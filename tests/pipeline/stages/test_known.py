"""Known requests: which are asked, what is recorded, and which are asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.cluster.tasks import Task
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.run_folder.folder import RunFolder
from pipeline.stages import known
from pipeline.stages.context import Context
from pipeline.stages.known import find_known, still_known
from pipeline.stages.publication import publish_model
from pmet.request import EditRequest
from tests.conftest import GOLDEN

BASE, EDITED = ModelSource("base", False), ModelSource("edited", False)
# Accepted requests are reordered, and some rows were rejected.
ROWS = [9, 2, 4, 7, 0, 5, 8]
KNOWN = {"base": {2, 5, 7, 8}, "edited": {2, 7, 9}}


class Team:
    """An executor whose models know the rows of ``KNOWN``; answers arrive out of order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    def map(self, method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        for task in reversed(tasks):
            source, requests = task.args
            rows = [request.case_id for request in requests]
            self.asked.insert(0, (source.folder, rows))
            take(task, [row in KNOWN[source.folder] for row in rows])


@pytest.fixture
def asking(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Context, Team]]:
    """A run that resumes in one folder, whose requests are asked three at a time."""
    monkeypatch.setattr(known, "ASKED_TOGETHER", 3)

    def begin(*, skip: bool = True) -> tuple[Context, Team]:
        folder, team = RunFolder(str(tmp_path)), Team()
        folder.begin({"job": "1"}, seed=0)
        table = SimpleNamespace(
            requests=[EditRequest("{} is", "it", "so", case_id=row) for row in ROWS], rows=ROWS
        )
        plan = SimpleNamespace(job=SimpleNamespace(skip_known=skip), base=BASE, table=table)
        return Context(cast(Any, plan), folder, cast(Any, team), Progress()), team

    return begin


def test_all_accepted_requests_are_asked_once(asking: Any) -> None:
    run, team = asking()
    assert find_known(run) == {2, 5, 7, 8}
    assert team.asked == [("base", [9, 2, 4]), ("base", [7, 0, 5]), ("base", [8])]
    assert run.folder.status["stages"][0]["detail"] == {"asked": 7, "known": 4}
    again, idle = asking()
    assert find_known(again) == {2, 5, 7, 8}
    assert idle.asked == []


def test_only_the_known_are_asked_again(asking: Any) -> None:
    run, team = asking()
    assert still_known(run, find_known(run), EDITED) == {2, 7}
    assert team.asked[:2] == [("edited", [2, 7, 5]), ("edited", [8])]
    again, idle = asking()
    assert still_known(again, find_known(again), EDITED) == {2, 7}
    assert idle.asked == []


def test_another_model_is_measured_again(asking: Any) -> None:
    run, _ = asking()
    still_known(run, find_known(run), EDITED)
    run.plan.checkpoint = Checkpoint.open(GOLDEN / "gpt2" / "model")
    publish_model(run, [])
    again, team = asking()
    still_known(again, find_known(again), EDITED)
    assert [source for source, _ in team.asked] == ["edited", "edited"]


def test_a_job_that_does_not_skip_them_asks_no_worker(asking: Any) -> None:
    run, team = asking(skip=False)
    assert find_known(run) == frozenset()
    assert still_known(run, frozenset(), EDITED) == frozenset()
    assert team.asked == []
    assert run.folder.status["stages"] == []
