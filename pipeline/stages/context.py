"""What all stages share: the plan, the run folder, the executor, and the progress display."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.cluster import Task
from pipeline.data import Place, Row, places_from
from pipeline.events import EventKind, OnEvent, StageName
from pipeline.plan import Plan
from pipeline.progress import CountedStage, Progress, Stage
from pipeline.run_folder import RunFolder
from pipeline.storage import Store

if TYPE_CHECKING:
    from pipeline.workers import Executor


def channel(folder: RunFolder, progress: Progress) -> OnEvent:
    """Return a function that records each event in ``run.json`` and shows it."""

    def on_event(
        kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        folder.event(kind, text, shard=shard, attempt=attempt)
        progress.event(kind, text, shard=shard, attempt=attempt)

    return on_event


@dataclass(frozen=True)
class Context:
    """The objects that every stage works with."""

    plan: Plan
    folder: RunFolder
    executor: Executor
    progress: Progress

    @property
    def store(self) -> Store:
        """The run folder's files."""
        return self.folder.store

    @property
    def event(self) -> OnEvent:
        """Records an event in ``run.json`` and shows it."""
        return channel(self.folder, self.progress)

    @contextmanager
    def stage(
        self, name: StageName, total: int | None = None
    ) -> Iterator[tuple[Stage, dict[str, Any]]]:
        """Time a stage in ``run.json`` and show it; yields the bar and the stage's detail.

        ``total`` is its work in the unit of `pipeline.events.UNITS`; None: set later.
        """
        with self.folder.stage(name, total) as detail, self.progress.stage(name, total) as bar:
            yield CountedStage(bar, total, self.folder.progress), detail

    def map(self, method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        """Run a stage's tasks; a result is taken only while the run holds its folder."""

        def take_if_held(task: Task, value: Any) -> None:
            self.folder.check()
            take(task, value)

        self.executor.map(method, tasks, take_if_held)


@dataclass
class FoundTargets:
    """Where the targets are stored.

    Attributes:
        files: file in the run folder, by shard number.
        failures: reason by row of the input, for requests that have no target.
        known: input rows that need no target, because the base model already answers as wanted.
    """

    files: dict[int, str] = field(default_factory=dict)
    failures: dict[Row, str] = field(default_factory=dict)
    known: frozenset[Row] = frozenset()

    def edited(self, rows: Iterable[Row]) -> list[Row]:
        """The given rows that have a target."""
        return [row for row in rows if row not in self.failures and row not in self.known]


def sampled(plan: Plan) -> list[Place]:
    """The accepted requests to measure: all, or a sample of the size asked for."""
    count, wanted = len(plan.table.requests), plan.job.evaluate.sample
    if wanted is None or wanted >= count:
        return list(places_from(0, count))
    return sorted(random.Random(plan.job.seed).sample(places_from(0, count), wanted))
