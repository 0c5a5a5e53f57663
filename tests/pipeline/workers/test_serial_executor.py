"""The workers and ranks of a job without Ray: what they hold, and how errors surface."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pipeline.cluster.tasks import Task
from pipeline.errors import JobError, WorkerError
from pipeline.plan import Plan
from pipeline.workers import serial_executor
from pipeline.workers.serial_executor import SerialExecutor, SerialRank
from pmet.errors import NumericalError


class Worker:
    """A fake replica that counts how many exist."""

    held = 0

    def __init__(self, source: str) -> None:
        self.source, self.calls = source, 0
        Worker.held += 1

    def __del__(self) -> None:
        Worker.held -= 1

    def call(self, what: str) -> tuple[str, int, int]:
        self.calls += 1
        if what == "fails":
            raise ValueError("it fails")
        return what, self.calls, torch.get_num_threads()


class Rank:
    """A fake rank of the update."""

    def __init__(self, meeting: None, workers: int) -> None:
        assert meeting is None
        assert Worker.held == workers

    def add(self, one: int, two: int) -> int:
        return one + two

    def fail(self, error: Exception) -> None:
        raise error


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(serial_executor, "ModelWorker", Worker)
    monkeypatch.setattr(Worker, "held", 0)
    targets = SimpleNamespace(workers=0, threads_per_worker=2)
    job = SimpleNamespace(targets=targets, update=None)
    return cast(Plan, SimpleNamespace(job=job, base="base"))


def test_one_worker_stays_until_it_is_let_go_and_threads_come_back(plan: Plan) -> None:
    before = torch.get_num_threads()
    with SerialExecutor(plan, lambda *_, **__: None) as executor:
        assert executor.ranks == 1
        assert [executor.one("call", "one", (name,)) for name in "ab"] == [("a", 1, 2), ("b", 2, 2)]
        executor.release()
        assert Worker.held == 0
        assert executor.one("call", "one", ("c",)) == ("c", 1, 2)
        executor.dismiss()
        assert (Worker.held, torch.get_num_threads()) == (0, before)
    assert torch.get_num_threads() == before


def test_a_task_that_fails_is_tried_again_and_given_up_alone(plan: Plan) -> None:
    events: list[str] = []
    found: list[Any] = []
    tasks = [Task("good", ("good",)), Task("bad", ("fails",)), Task("last", ("last",))]
    with SerialExecutor(plan, lambda kind, _, **__: events.append(kind)) as executor:
        (failed,) = executor.try_all(
            "call", tasks, lambda task, _: found.append(task.key), workers=1
        )
        with pytest.raises(WorkerError, match=r"1 of 3 tasks failed 3 times each: bad: ValueError"):
            executor.map("call", tasks, lambda *_: None)
    assert found == ["good", "last"]
    assert (failed.task.key, failed.attempts) == ("bad", 3)
    assert failed.failure.text.startswith("ValueError: it fails (")
    assert events == ["retry", "retry", "failed"] * 2


def test_the_rank_comes_when_the_worker_has_gone(plan: Plan) -> None:
    with SerialExecutor(plan, lambda *_, **__: None) as executor:
        executor.one("call", "one", ("a",))
        executor.expect_ranks(Rank, (0,))
        with executor.take_ranks(Rank, (0,)) as group:
            assert group.call_all("add", 1, 2) == [3]
            assert group.call_each("add", [(3, 4)]) == [7]


def test_errors_of_a_rank_are_those_of_a_group() -> None:
    with SerialRank(Rank, (0,)) as group:
        for error in (JobError("bad job"), NumericalError("no number")):
            with pytest.raises(type(error), match=str(error)):
                group.call_all("fail", error)
        with pytest.raises(
            WorkerError, match=r"the update failed in fail: OSError: disk \("
        ) as found:
            group.call_all("fail", OSError("disk"))
        assert found.value.cause_text == "disk"
    with pytest.raises(WorkerError, match="the update failed in start: AssertionError"):
        SerialRank(Rank, (1,))


def test_a_rank_among_other_processes_computes_with_as_many_threads_as_they_have() -> None:
    before = torch.get_num_threads()
    own = before + 1
    with SerialRank(Rank, (0,), own):
        assert torch.get_num_threads() == own
    assert torch.get_num_threads() == before
    with pytest.raises(WorkerError):
        SerialRank(Rank, (1,), own)
    assert torch.get_num_threads() == before
