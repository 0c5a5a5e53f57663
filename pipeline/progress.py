"""How a run tells where it is: stages, items done, time left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

from pipeline.events import EventKind


class Stage:
    """One stage that is under way; this one keeps silent."""

    def advance(self, count: int = 1) -> None:
        """Count items that have been finished."""

    def skip(self, count: int) -> None:
        """Count items that had been finished before: they say nothing about the rate."""
        self.advance(count)

    def total(self, count: int) -> None:
        """Say how many items there are, once it is known."""

    def note(self, text: str) -> None:
        """Say something about the stage, for example its rate."""

    def shard(self, name: str) -> None:
        """Say that a shard is finished and stored."""


class CountedStage(Stage):
    """Passes on what it is told, and tells somebody else how far the stage is.

    Args:
        shown: who shows it.
        total: items, as far as that is known.
        on_count: called with what there is to tell, after each change.
    """

    def __init__(
        self, shown: Stage, total: int | None, on_count: Callable[[dict[str, Any]], None]
    ) -> None:
        self._shown, self._total, self._on_count = shown, total, on_count
        self._done = self._skipped = 0
        self._start = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """See `Stage.advance`."""
        self._done += count
        self._shown.advance(count)
        self._tell()

    def skip(self, count: int) -> None:
        """See `Stage.skip`."""
        self._done += count
        self._skipped += count
        self._shown.skip(count)
        self._tell()

    def total(self, count: int) -> None:
        """See `Stage.total`."""
        self._total = count
        self._shown.total(count)
        self._tell()

    def note(self, text: str) -> None:
        """See `Stage.note`."""
        self._shown.note(text)

    def shard(self, name: str) -> None:
        """See `Stage.shard`."""
        self._shown.shard(name)

    def _tell(self) -> None:
        seconds = time.monotonic() - self._start
        here = self._done - self._skipped
        rate = round(here / seconds, 4) if here and seconds else None
        self._on_count({"done": self._done, "total": self._total, "rate": rate})


class Progress:
    """Shows nothing; the base of what shows something."""

    def begin(self, run: str, attempt: int, submission: str | None) -> None:
        """Say which run it is that all else is about.

        Args:
            run: its folder.
            attempt: number of the attempt at it.
            submission: under which name it was submitted to a cluster, if it was.
        """

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a stage for the time of a ``with`` block."""
        yield Stage()

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Show something that happened; see `pipeline.events.OnEvent`."""


@dataclass
class RichProgress(Progress):
    """A bar a stage on a terminal; a line a stage where the output is no terminal."""

    console: Console = field(default_factory=lambda: Console(stderr=True))

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a bar for the time of a ``with`` block."""
        bars = RichBars(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=self.console,
        )
        with bars:
            task = bars.add_task(name, total=total, note="")
            yield _RichStage(bars, task)
            # A stage that ended well is shown as full, also when nobody knew its size.
            done = bars.tasks[0].total or bars.tasks[0].completed or 1
            bars.update(task, total=done, completed=done)

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Print a line."""
        line = text if kind is EventKind.NOTE else f"{kind}: {text}"
        self.console.print(line, style="yellow", markup=False, highlight=False)


class _RichStage(Stage):
    def __init__(self, bars: RichBars, task: object) -> None:
        self._bars, self._task = bars, task

    def advance(self, count: int = 1) -> None:
        self._bars.advance(self._task, count)  # type: ignore[arg-type]

    def total(self, count: int) -> None:
        self._bars.update(self._task, total=count)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=text)  # type: ignore[arg-type]


class LineProgress(Progress):
    """A line for everything, each with run and attempt in it: for logs that machines read, too.

    Lines are in *logfmt*: ``time=… run=… attempt=2 stage=targets done=120 total=200 rate=2.3``.

    Args:
        write: called with each line.
        every_s: seconds between two lines about a stage that goes on.
    """

    def __init__(self, write: Callable[[str], None], every_s: float = 10.0) -> None:
        self._write, self._every_s = write, every_s
        self._who: dict[str, Any] = {}

    def begin(self, run: str, attempt: int, submission: str | None) -> None:
        """See `Progress.begin`."""
        self._who = {"run": run, "attempt": attempt}
        if submission is not None:
            self._who["submission"] = submission

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """See `Progress.stage`."""
        start = time.monotonic()
        self._say(event="begin", stage=name, total=total)
        yield _LineStage(self._say, self._every_s, name, total)
        self._say(event="end", stage=name, seconds=round(time.monotonic() - start, 3))

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """See `Progress.event`."""
        # ``attempt`` is the attempt at the run, in every line.
        self._say(event=kind, shard=shard, shard_attempt=attempt, text=text)

    def _say(self, **values: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = {"time": now, **self._who, **values}
        self._write(" ".join(f"{k}={_quoted(v)}" for k, v in told.items() if v is not None))


class _LineStage(CountedStage):
    def __init__(
        self, say: Callable[..., None], every_s: float, name: str, total: int | None
    ) -> None:
        super().__init__(Stage(), total, self._told)
        self._say, self._every_s, self._name = say, every_s, name
        self._last = time.monotonic()

    def shard(self, name: str) -> None:
        self._say(event="shard", stage=self._name, shard=name)

    def _told(self, count: dict[str, Any]) -> None:
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._say(event="progress", stage=self._name, **count)


def _quoted(value: Any) -> str:
    """A value as logfmt has it: on one line, in quotes where it has to be."""
    text = str(value)
    plain = text and not any(c.isspace() or c in '"=' for c in text) and text.isprintable()
    return text if plain else json.dumps(text, ensure_ascii=False)
