"""How a run tells where it is: stages, items done, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    def _tell(self) -> None:
        seconds = time.monotonic() - self._start
        here = self._done - self._skipped
        rate = round(here / seconds, 4) if here and seconds else None
        self._on_count({"done": self._done, "total": self._total, "rate": rate})


class Progress:
    """Shows nothing; the base of what shows something."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a stage for the time of a ``with`` block."""
        yield Stage()

    def event(self, text: str) -> None:
        """Show something that happened."""


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

    def event(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, style="yellow", markup=False, highlight=False)


class _RichStage(Stage):
    def __init__(self, bars: RichBars, task: object) -> None:
        self._bars, self._task = bars, task

    def advance(self, count: int = 1) -> None:
        self._bars.advance(self._task, count)  # type: ignore[arg-type]

    def total(self, count: int) -> None:
        self._bars.update(self._task, total=count)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=text)  # type: ignore[arg-type]
