"""What is to be done next for a schedule, from the schedule and its log alone.

So every runner, on whatever machine and after whatever crash, comes to the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from jobs.schedule.cron import last_times, next_time
from jobs.schedule.records import Night, Schedule

# A night that took its runner with it as often as this is not tried again.
MAX_DEATHS = 3
MAX_COVERS = 100
# What "late" means where missed nights are not made up.
LATE = timedelta(hours=1)
BACK_OFF = timedelta(minutes=5)
MAX_BACK_OFF = timedelta(hours=1)
_FINAL = frozenset({"done", "held back", "bad input", "left out"})


@dataclass(frozen=True)
class Task:
    """The next night.

    Attributes:
        due: its due time.
        covers: the due times it stands for, ``due`` last.
        attempt: 1 for the first one.
        at: when to start it.
        is_late: it is left out rather than run.
    """

    due: datetime
    covers: tuple[datetime, ...]
    attempt: int
    at: datetime
    is_late: bool = False


def next_task(schedule: Schedule, nights: Sequence[Night], now: datetime) -> Task | None:
    """The night that is due, or the one that will be; None while the schedule is disabled.

    Args:
        schedule: the schedule.
        nights: its log, the oldest first, at least from the last due time that is settled.
        now: the time, with its zone.
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
    """Whether nothing more is tried for a due time."""
    outcomes = [night.outcome for night in _attempts(due, nights)]
    if _FINAL.intersection(outcomes):
        return True
    return outcomes.count("failed") > retries or outcomes.count("died") >= MAX_DEATHS


def _attempts(due: datetime, nights: Sequence[Night]) -> list[Night]:
    return [night for night in nights if night.due == due]


def _start(due: datetime, attempts: Sequence[Night]) -> datetime:
    """When a due time is tried (again): after a failure it waits, each time twice as long."""
    if not attempts:
        return due
    last = attempts[-1]
    ended = last.finished or last.started
    if last.outcome != "failed":
        return ended
    failures = sum(night.outcome == "failed" for night in attempts)
    return ended + min(BACK_OFF * 2 ** (failures - 1), MAX_BACK_OFF)
