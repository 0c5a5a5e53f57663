"""Computes when a cron expression is due, in a time zone.

The rules are those of Debian's cron. When clocks go forward, a time that does not exist that day is
due at the next minute that does; when clocks go back, a time that occurs twice is due only the
first time. Expressions whose minute or hour starts with ``*`` follow elapsed time instead: ``*/30 *
* * *`` is due every half hour on such a day too.
"""

from __future__ import annotations

import difflib
import functools
import zoneinfo
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from pipeline.errors import ScheduleError

FIELDS = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day-of-month": "1 to 31",
    "month": "1 to 12, or JAN to DEC",
    "day-of-week": "0 to 7, where 0 and 7 are Sunday, or SUN to SAT",
}
_ANY_YEAR = datetime(2024, 1, 1, tzinfo=UTC)
_MINUTE = timedelta(minutes=1)
# Upper bounds on how far clocks go back and forward anywhere: Samoa once skipped a whole day.
_FOLD, _GAP = timedelta(hours=3), timedelta(hours=25)


@dataclass(frozen=True)
class Fields:
    """The numbers that each field of an expression matches; None: every number.

    Attributes:
        minutes: 0 to 59.
        hours: 0 to 23.
        days: days of the month, 1 to 31.
        months: 1 to 12.
        weekdays: 0 (Sunday) to 6.
        either_day: if neither is None, a day in ``days`` or in ``weekdays`` is due; else it must be
            in both.
    """

    minutes: tuple[int, ...] | None
    hours: tuple[int, ...] | None
    days: tuple[int, ...] | None
    months: tuple[int, ...] | None
    weekdays: tuple[int, ...] | None
    either_day: bool


class _Rule:
    """Converts wall-clock times to instants.

    The expression is evaluated in wall-clock time and the time zone applied afterwards, because
    `CronSim` skips some times when clocks change by half an hour.

    Attributes:
        margin: maximum difference between an instant and its wall-clock time.
    """

    def __init__(self, cron: str, zone: ZoneInfo) -> None:
        self._zone = zone
        minute, hour, *_ = cron.split()
        self._elapsed = minute.startswith("*") or hour.startswith("*")
        self.margin = _FOLD if self._elapsed else _GAP

    def wall(self, time: datetime) -> datetime:
        """Return the wall-clock time at an instant."""
        return time.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def instants(self, wall: datetime) -> list[datetime]:
        """Return the instants, in UTC, that are due for a wall-clock time."""
        passes = (wall.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        real = sorted({time for time in passes if self.wall(time) == wall})
        if self._elapsed:
            return real
        return real[:1] or self._after_gap(wall)

    def _after_gap(self, wall: datetime) -> list[datetime]:
        """Return the first instant after a wall-clock time that does not exist."""
        while self.wall(wall.replace(tzinfo=self._zone).astimezone(UTC)) != wall:
            wall += _MINUTE
        return self.instants(wall)


def check_cron(cron: str) -> str:
    """Validate an expression; return it with single spaces.

    Raises:
        ScheduleError: it does not have five fields, a field is invalid, or it is never due.
    """
    texts = cron.split()
    if len(texts) != len(FIELDS):
        raise ScheduleError(
            f"cron {cron!r} has {len(texts)} fields, not five: {', '.join(FIELDS)}; for example "
            "'0 2 * * *' for every night at two"
        )
    for position, (name, allowed) in enumerate(FIELDS.items()):
        alone = [*("*" * position), texts[position], *("*" * (len(FIELDS) - position - 1))]
        try:
            CronSim(" ".join(alone), _ANY_YEAR)
        except (CronSimError, ValueError):
            raise ScheduleError(
                f"cron {cron!r}: the {name}, {texts[position]!r}, is invalid; write numbers "
                f"from {allowed}, with , - / or *"
            ) from None
    try:
        next(CronSim(cron, _ANY_YEAR))
    except (CronSimError, StopIteration):
        raise ScheduleError(
            f"cron {cron!r}: no year has such a day; correct the day or the month"
        ) from None
    return " ".join(texts)


def check_timezone(name: str) -> str:
    """Validate the name of a time zone and return it.

    Raises:
        ScheduleError: there is no such time zone; the message suggests similar names.
    """
    known = _zones()
    if name in known:
        return name
    wanted = name.casefold().replace(" ", "_")
    places = {zone: zone.casefold().rpartition("/")[2] for zone in known}
    exact = [zone for zone in known if wanted in (zone.casefold(), places[zone])]
    spelled = difflib.get_close_matches(wanted, [*map(str.casefold, known), *places.values()])
    near = [zone for zone in known if {zone.casefold(), places[zone]} & set(spelled)]
    close = sorted(exact or near, key=lambda zone: ("/" not in zone, zone))[:3]
    remedy = (
        f"did you mean {' or '.join(close)}?" if close else "write it like Europe/Berlin or UTC"
    )
    raise ScheduleError(f"there is no time zone {name!r}; {remedy}")


def next_time(cron: str, timezone: str, after: datetime) -> datetime:
    """Return the first due time later than ``after``, in UTC."""
    rule = _Rule(cron, ZoneInfo(timezone))
    found = None
    for wall in CronSim(cron, rule.wall(after) - rule.margin):
        if found and wall > rule.wall(found) + rule.margin:
            return found
        later = [time for time in rule.instants(wall) if time > after]
        found = min(later if found is None else [*later, found], default=None)
    raise ScheduleError(f"cron {cron!r}: no year has such a day; correct the day or the month")


def last_times(
    cron: str, timezone: str, *, after: datetime, until: datetime, limit: int
) -> list[datetime]:
    """Return the due times later than ``after`` and up to ``until``, in UTC, oldest first.

    If there are more than ``limit``, the latest are returned.
    """
    rule = _Rule(cron, ZoneInfo(timezone))
    found: set[datetime] = set()
    first = rule.wall(after) - rule.margin
    enough = False
    for wall in CronSim(cron, rule.wall(until) + rule.margin, reverse=True):
        if wall < first:
            break
        found |= {time for time in rule.instants(wall) if after < time <= until}
        if not enough and len(found) >= limit:
            enough, first = True, rule.wall(min(found)) - rule.margin
    return sorted(found)[-limit:]


def fields(cron: str) -> Fields | None:
    """Return the numbers of an expression; None if it uses ``L`` or ``#``, which have none."""
    parsed = CronSim(cron, _ANY_YEAR)
    found = [*parsed.minutes, *parsed.hours, *parsed.days, *parsed.months, *parsed.weekdays]
    if not all(isinstance(number, int) and number >= 0 for number in found):
        return None
    days = _unless_all(parsed.days, 31)
    weekdays = _unless_all({day % 7 for day in parsed.weekdays if isinstance(day, int)}, 7)
    if not parsed.day_and and None in (days, weekdays):
        days = weekdays = None
    return Fields(
        minutes=_unless_all(parsed.minutes, 60),
        hours=_unless_all(parsed.hours, 24),
        days=days,
        months=_unless_all(parsed.months, 12),
        weekdays=weekdays,
        either_day=not parsed.day_and,
    )


@functools.cache
def _zones() -> frozenset[str]:
    """Return all zone names; cached because searching the folders takes a while."""
    return frozenset(zoneinfo.available_timezones())


def _unless_all(numbers: set[int], count: int) -> tuple[int, ...] | None:
    return None if len(numbers) == count else tuple(sorted(numbers))
