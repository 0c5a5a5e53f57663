"""How a run tells where it is: stages, items done, time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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

    def total(self, count: int) -> None:
        """Say how many items there are, once it is known."""

    def note(self, text: str) -> None:
        """Say something about the stage, for example its rate."""


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
