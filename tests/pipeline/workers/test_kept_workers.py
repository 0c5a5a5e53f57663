"""Workers that are kept from run to run; `tests.e2e.test_run` has two runs on the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from pipeline.cluster import WorkerPool
from pipeline.events import OnEvent, ignore
from pipeline.workers.kept_workers import KeptWorkers


class Started:
    """A pool that records who it reports to, and whether it was ended."""

    def __init__(self) -> None:
        self.closed = False
        self.serves: list[OnEvent] = []

    def serve(self, on_event: OnEvent, grown: Callable[[], int] | None) -> None:
        self.serves.append(on_event)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pools() -> list[Started]:
    """The pools that were started."""
    return []


@pytest.fixture
def take(pools: list[Started]) -> Callable[..., Started]:
    kept = KeptWorkers()

    def start() -> WorkerPool:
        pools.append(Started())
        return cast(WorkerPool, pools[-1])

    def taken(wanted: object, on_event: OnEvent = ignore) -> Started:
        return cast(Started, kept.take(wanted, start, on_event, None))

    return taken


def test_a_second_run_finds_the_workers_of_the_first(take, pools: list[Started]) -> None:
    def other(*_: object, **__: object) -> None:
        """Another run's events."""

    first = take(("model", 2))
    assert take(("model", 2), other) is first
    assert len(pools) == 1
    assert first.serves == [ignore, other]


def test_other_workers_take_the_place_of_those_kept(take, pools: list[Started]) -> None:
    first = take(("model", 2))
    second = take(("model", 3))
    assert second is not first
    assert first.closed
    assert not second.closed


def test_workers_that_a_failed_run_has_ended_are_replaced(take, pools: list[Started]) -> None:
    first = take("alike")
    first.close()
    assert take("alike") is not first
    assert len(pools) == 2
