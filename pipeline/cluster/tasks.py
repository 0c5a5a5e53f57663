"""Tasks of a stage: which are still to be attempted, how often, and which have failed for good."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.events import EventKind, OnEvent
from pipeline.failures import Failure


@dataclass(frozen=True)
class Task:
    """One call of a worker's method.

    Attributes:
        key: names the task in messages; unique within a stage.
        args: positional arguments of the call.
        attempts: how often it is attempted; None uses the pool's number.
        shard: the name of the shard that it belongs to, for events; None if there is none.
    """

    key: str
    args: tuple[Any, ...] = ()
    attempts: int | None = None
    shard: str | None = None


@dataclass(frozen=True)
class FailedTask:
    """A task that failed for good.

    Attributes:
        task: the task.
        attempts: how often it was attempted.
        failure: root cause of the last attempt.
    """

    task: Task
    attempts: int
    failure: Failure


@dataclass(frozen=True)
class Attempt:
    """Attempt ``number`` at the task at position ``place`` of its stage; both from 1."""

    task: Task
    place: int
    number: int

    def report(self, on_event: OnEvent, kind: EventKind, text: str) -> None:
        """Send an event that concerns this attempt."""
        on_event(kind, text, shard=self.task.shard, attempt=self.number)


class TaskQueue:
    """The tasks of one stage still to be attempted, and those that failed; see `Pool.run`."""

    def __init__(
        self,
        tasks: Iterable[Task],
        max_attempts: int,
        on_event: OnEvent,
        on_drained: Callable[[], None] | None,
    ) -> None:
        self._fresh: Iterator[Attempt] = (
            Attempt(task, place, 1) for place, task in enumerate(tasks, start=1)
        )
        self._again: deque[Attempt] = deque()
        self._given_up: list[tuple[int, FailedTask]] = []
        self._max_attempts = max_attempts
        self._on_event = on_event
        self._on_drained = on_drained

    @property
    def empty(self) -> bool:
        """Whether nothing is left to take."""
        if not self._again and (attempt := next(self._fresh, None)) is not None:
            self._again.append(attempt)
        return not self._again

    def take(self) -> Attempt | None:
        """The next attempt. Failed tasks go first, so that persistent faults show early."""
        if self.empty:
            return None
        attempt = self._again.popleft()
        if self._on_drained and self.empty:
            self._on_drained()
            # Only once: failed tasks come back.
            self._on_drained = None
        return attempt

    def failed(self, attempt: Attempt, failure: Failure) -> None:
        """Schedule another attempt, or give the task up."""
        task, number = attempt.task, attempt.number
        allowed = task.attempts or self._max_attempts
        text = f"{task.key}, attempt {number} of {allowed}: {failure}"
        if number < allowed:
            attempt.report(self._on_event, EventKind.RETRY, text)
            self._again.appendleft(Attempt(task, attempt.place, number + 1))
        else:
            attempt.report(self._on_event, EventKind.FAILED, text)
            self._given_up.append((attempt.place, FailedTask(task, number, failure)))

    def given_up(self) -> list[FailedTask]:
        """The tasks given up, in the order of the stage."""
        return [failed for _, failed in sorted(self._given_up, key=lambda item: item[0])]
