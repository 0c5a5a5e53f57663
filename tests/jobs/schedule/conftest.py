"""A store, a simulated clock, and runs that start no process."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.schedule import runner as runner_module
from jobs.schedule.book import Book
from jobs.schedule.night import Clock
from jobs.schedule.records import Night, Schedule, make_schedule
from jobs.schedule.runner import Runner

START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
NEVER = datetime.max.replace(tzinfo=UTC)


def at(text: str) -> datetime:
    """A time of November 2026 in UTC, from ``day hour:minute``."""
    return datetime.strptime(f"2026-11-{text}", "%Y-%m-%d %H:%M").replace(tzinfo=UTC)


def schedule(name: str = "facts", **values: Any) -> Schedule:
    given = {"refresh": "/r.yaml", "cron": "0 2 * * *", "added_at": START, "since": START}
    return make_schedule(name=name, **given | values)


def night(due: datetime, attempt: int = 1, **values: Any) -> Night:
    given = {
        "schedule": "facts",
        "due": due,
        "covers": (due,),
        "attempt": attempt,
        "host": "there",
        "pid": 1,
        "started": due,
        "finished": due + timedelta(minutes=10),
        "outcome": "done",
    }
    return Night.model_validate(given | values)


class TestClock(Clock):
    """A clock whose time advances when it is waited for, and that stops at ``end``."""

    __test__ = False

    def __init__(self, now: datetime = START, end: datetime = NEVER):
        super().__init__()
        self.time, self.end, self.waits = now, end, 0

    def now(self) -> datetime:
        return self.time

    def wait(self, seconds: float) -> None:
        self.waits += 1
        self.time += timedelta(seconds=max(0.0, seconds))
        if self.time >= self.end:
            self.stop()


class Nights:
    """Replaces the processes of runs: each takes ten minutes and exits with a given status."""

    def __init__(self) -> None:
        self.statuses: list[int | Callable[[], int]] = []
        self.begun: list[tuple[str, datetime]] = []

    def __call__(self, command: list[str], *, clock: TestClock, output: Path, **_: Any) -> int:
        self.begun.append((command[0], clock.now()))
        output.write_text("one\ntwo\n")
        status = self.statuses.pop(0) if self.statuses else 0
        clock.time += timedelta(minutes=10)
        return status() if callable(status) else status


@pytest.fixture(params=["local", "memory"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Book:
    """An empty store, on disk and in memory."""
    local = request.param == "local"
    return Book(str(tmp_path / "store") if local else f"memory://{uuid.uuid4().hex}/store")


@pytest.fixture
def nights(monkeypatch: pytest.MonkeyPatch) -> Nights:
    nights = Nights()
    monkeypatch.setattr(runner_module, "run_night", nights)
    return nights


@pytest.fixture
def make_runner(book: Book, nights: Nights) -> Callable[..., tuple[Runner, TestClock, list[str]]]:
    """Makes a runner that starts at a time, its clock, and the list of its messages."""

    def make(
        now: datetime, *, until: datetime | None = None, names: tuple[str, ...] = ()
    ) -> tuple[Runner, TestClock, list[str]]:
        clock = TestClock(now, until or NEVER)
        said: list[str] = []
        runner = Runner(book, clock=clock, say=said.append, names=names, command=lambda s: [s.name])
        return runner, clock, said

    return make
