"""Terminal output of ``pmet schedule``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.schedule.book import Book
from jobs.schedule.due import next_task
from jobs.schedule.records import Night, Schedule
from pipeline.errors import ScheduleError


def show_schedules(book: Book, now: datetime, console: Console) -> None:
    """Print every schedule with its next due time, in this machine's zone, and its last run."""
    names = book.names()
    if not names:
        console.print(f"no schedules in {book.url}", markup=False, soft_wrap=True)
        return
    table = Table("name", "cron", "zone", "next", "last run", "refresh")
    for name in names:
        try:
            table.add_row(*map(Text, _row(book, book.get(name), now)))
        except ScheduleError as error:
            table.add_row(Text(name), "", "", "", Text(str(error), style="red"), "")
    console.print(table)


def show_log(book: Book, nights: Sequence[Night], console: Console) -> None:
    """Print attempts, latest last, and the location of the latest output."""
    table = Table("due", "covers", "attempt", "started", "duration", "outcome", "host", "last line")
    for night in nights:
        count = len(night.covers)
        cells = (
            local(night.due),
            f"{count} runs" if count > 1 else "",
            str(night.attempt),
            local(night.started),
            _took(night),
            night.words,
            night.host,
            night.output[-1] if night.output else "",
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    if nights and nights[-1].log:
        console.print(
            f"output of the last one: {book.location(nights[-1].log)}", markup=False, soft_wrap=True
        )


def local(time: datetime) -> str:
    """Format a time in this machine's zone."""
    return f"{time.astimezone():%Y-%m-%d %H:%M %Z}"


def _row(book: Book, schedule: Schedule, now: datetime) -> tuple[str, ...]:
    running = book.running(schedule.name)
    recent = book.recent(schedule)
    task = next_task(schedule, recent, now)
    if running is not None:
        last = f"running on {running.host} since {local(running.started)}"
    else:
        last = f"{recent[-1].words}, due {local(recent[-1].due)}" if recent else "none yet"
    if task is None:
        due = "disabled"
    else:
        due = local(task.at) if task.at > now else f"now, due {local(task.due)}"
    return schedule.name, schedule.cron, schedule.timezone, due, last, schedule.refresh


def _took(night: Night) -> str:
    if night.finished is None:
        return "–"
    seconds = round((night.finished - night.started).total_seconds())
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"
