"""Decides what to do next for a schedule, from the schedule and its log alone.

So every runner comes to the same decision, on any machine and after any crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from jobs.schedule.cron import last_times, next_time
from jobs.schedule.records import Night, Schedule

# A run that took its runner down this many times is not retried.
MAX_DEATHS = 3
MAX_COVERS = 100
# How late a run may start if missed runs are skipped.
LATE = timedelta(hours=1)
BACK_OFF = timedelta(minutes=5)
MAX_BACK_OFF = timedelta(hours=1)
_FINAL = frozenset({"done", "held back", "bad input", "left out"})


@dataclass(frozen=True)
class Task:
    """The next run of a schedule.

    Attributes:
        due: its due time.
        covers: the due times that it covers, ``due`` last.
        attempt: 1 for the first attempt.
        at: when to start it.
        is_late: it is recorded as left out rather than run.
    """

    due: datetime
    covers: tuple[datetime, ...]
    attempt: int
    at: datetime
    is_late: bool = False


def next_task(schedule: Schedule, nights: Sequence[Night], now: datetime) -> Task | None:
    """Return the run that is due now or next; None while the schedule is disabled.

    Args:
        schedule: the schedule.
        nights: its log, oldest first, at least from the last settled due time.
        now: the current time, with a time zone.
    """
    if not schedule.enabled:
        return None
    settled = [night.due for night in nights if is_settled(night.due, nights, schedule.retries)]
    after = max([schedule.since, *settled])
    covers = last_times(schedule.cron, schedule.timezone, after=after, until=now, limit=MAX_COVERS)
    if not covers:
        due = next_time(schedule.cron, schedule.timezone, max(after, now))
        return Task(due, (due,), 1, due)
    due = covers[-1]
    attempts = _attempts(due, nights)
    at = _start(due, attempts)
    is_late = schedule.catch_up == "never" and now - at > LATE
    return Task(due, tuple(covers), len(attempts) + 1, at, is_late)


def is_settled(due: datetime, nights: Sequence[Night], retries: int) -> bool:
    """Whether a due time needs no further attempt."""
    outcomes = [night.outcome for night in _attempts(due, nights)]
    if _FINAL.intersection(outcomes):
        return True
    return outcomes.count("failed") > retries or outcomes.count("died") >= MAX_DEATHS


def _attempts(due: datetime, nights: Sequence[Night]) -> list[Night]:
    return [night for night in nights if night.due == due]


def _start(due: datetime, attempts: Sequence[Night]) -> datetime:
    """Return when to start the next attempt: the wait doubles after each failure."""
    if not attempts:
        return due
    last = attempts[-1]
    ended = last.finished or last.started
    if last.outcome != "failed":
        return ended
    failures = sum(night.outcome == "failed" for night in attempts)
    return ended + min(BACK_OFF * 2 ** (failures - 1), MAX_BACK_OFF)
