"""How a run reports its progress: stages, items done, time left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.table import Column
from rich.text import Text

from pipeline.events import UNITS, EventKind

_WIDE = 100
"""Columns of a terminal from which there is room for a bar beside the numbers."""


class Stage:
    """A stage in progress; this base class shows nothing."""

    def advance(self, count: int = 1) -> None:
        """Count items that were finished."""

    def skip(self, count: int) -> None:
        """Count items finished earlier, which are left out of the rate."""
        self.advance(count)

    def total(self, count: int) -> None:
        """Set the number of items, once it is known."""

    def note(self, text: str) -> None:
        """Show a note about the stage, for example its rate."""

    def shard(self, name: str) -> None:
        """Report that a shard is finished and stored."""


class CountedStage(Stage):
    """Forwards every call to another stage, and reports the count after each change.

    Args:
        shown: the stage that shows it.
        total: the number of items, if known.
        on_count: called with the current count after each change.
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
    """Shows nothing; the base class of progress displays."""

    def begin(self, run: str, attempt: int, submission: str | None) -> None:
        """Set the run that all later calls are about.

        Args:
            run: the run's folder.
            attempt: the number of the attempt at it.
            submission: the name under which it was submitted to a cluster, if it was.
        """

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a stage for the duration of a ``with`` block."""
        yield Stage()

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Show an event; see `pipeline.events.OnEvent`."""


@dataclass
class RichProgress(Progress):
    """One bar per stage on a terminal; one line per stage otherwise."""

    console: Console = field(default_factory=lambda: Console(stderr=True))

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a bar for the duration of a ``with`` block."""
        wide = self.console.width >= _WIDE
        note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        bars = RichBars(
            _State(),
            TextColumn("{task.description:<16}", markup=False, table_column=_fixed()),
            *([BarColumn(bar_width=28)] if wide else []),
            _Count(table_column=_fixed()),
            _Elapsed(table_column=_fixed()),
            _Left(table_column=_fixed()),
            TextColumn("{task.fields[note]}", markup=False, style="dim", table_column=note),
            console=self.console,
            expand=True,
        )
        with bars:
            task = bars.add_task(name, total=total, note="", unit=UNITS.get(name, ""), ended=False)
            yield _RichStage(bars, task)
            # A stage that ended well is shown as full, even if its size was unknown.
            done = bars.tasks[0].total or bars.tasks[0].completed
            bars.update(task, total=done, completed=done, ended=True)

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Print a line."""
        line = text if kind is EventKind.NOTE else f"{kind}: {text}"
        self.console.print(line, style="yellow", markup=False, highlight=False)


def _fixed() -> Column:
    return Column(no_wrap=True)


class _State(SpinnerColumn):
    """A spinner until the stage ends, then a tick; work may follow the last counted item."""

    def render(self, task: Task) -> RenderableType:
        return Text("✓") if task.fields["ended"] else self.spinner.render(task.get_time())


class _Count(ProgressColumn):
    """How much is done, of how much, in the stage's unit."""

    def render(self, task: Task) -> Text:
        if not (task.total or task.completed):
            return Text("")
        total = "?" if task.total is None else f"{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}/{total} {task.fields['unit']}".rstrip())


class _Elapsed(ProgressColumn):
    """The time since the stage began, also when all items are counted and other work goes on."""

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(task.elapsed or 0))), style="progress.elapsed")


class _Left(TimeRemainingColumn):
    """The time left; unknown while work goes on after the last counted item."""

    def render(self, task: Task) -> Text:
        if task.fields["ended"]:
            return Text("")
        full = task.total is not None and task.completed >= task.total
        return Text("-:--:--", style="progress.remaining") if full else super().render(task)


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
    """One line per event and count, each with run and attempt: readable for machines, too.

    Lines are in *logfmt*: ``time=… run=… attempt=2 stage=targets done=120 total=200 rate=2.3``.

    Args:
        write: called with each line.
        every_s: seconds between two lines about a running stage.
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
        self._say(event="begin", stage=name, total=total, unit=UNITS.get(name))
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
    """A value in logfmt syntax: on one line, quoted where necessary."""
    text = str(value)
    plain = text and not any(c.isspace() or c in '"=' for c in text) and text.isprintable()
    return text if plain else json.dumps(text, ensure_ascii=False)
