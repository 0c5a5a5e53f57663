"""When a cron expression is due, in a time zone.

The times are those of Debian's cron. Where clocks are put forward, a time that does not exist
that day comes with the next minute that does; where they are put back, a time that comes twice
counts once, the first time. Expressions whose minute or hour begins with ``*`` go by elapsed
time instead: ``*/30 * * * *`` comes every half hour of such a day, too.
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
# Clocks are put back by less than this anywhere, and forward by less than that: Samoa has left out
# a whole day.
_FOLD, _GAP = timedelta(hours=3), timedelta(hours=25)


@dataclass(frozen=True)
class Fields:
    """The numbers that an expression stands for; None where every number does.

    Attributes:
        minutes: 0 to 59.
        hours: 0 to 23.
        days: of the month, 1 to 31.
        months: 1 to 12.
        weekdays: 0, Sunday, to 6.
        either_day: a day is due that is in ``days`` or in ``weekdays``, where neither is None;
            else it has to be in both.
    """

    minutes: tuple[int, ...] | None
    hours: tuple[int, ...] | None
    days: tuple[int, ...] | None
    months: tuple[int, ...] | None
    weekdays: tuple[int, ...] | None
    either_day: bool


class _Rule:
    """How times on the wall become instants.

    The expression is asked for times on the wall, and only then comes the time zone: `CronSim`
    steps over some times where clocks change by half an hour.

    Attributes:
        margin: by how much an instant can be off the wall time that it stands for.
    """

    def __init__(self, cron: str, zone: ZoneInfo) -> None:
        self._zone = zone
        minute, hour, *_ = cron.split()
        self._elapsed = minute.startswith("*") or hour.startswith("*")
        self.margin = _FOLD if self._elapsed else _GAP

    def wall(self, time: datetime) -> datetime:
        """The time on the wall at an instant."""
        return time.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def instants(self, wall: datetime) -> list[datetime]:
        """The instants, in UTC, that are due for a time on the wall."""
        passes = (wall.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        real = sorted({time for time in passes if self.wall(time) == wall})
        if self._elapsed:
            return real
        return real[:1] or self._after_gap(wall)

    def _after_gap(self, wall: datetime) -> list[datetime]:
        """The first instant after a time that the clock leaves out."""
        while self.wall(wall.replace(tzinfo=self._zone).astimezone(UTC)) != wall:
            wall += _MINUTE
        return self.instants(wall)


def check_cron(cron: str) -> str:
    """The expression, with single spaces.

    Raises:
        ScheduleError: it has not five fields, one of them cannot be read, or it is never due.
    """
    texts = cron.split()
    if len(texts) != len(FIELDS):
        raise ScheduleError(
            f"cron {cron!r} has {len(texts)} fields, not five: {', '.join(FIELDS)}; every night at "
            "two is '0 2 * * *'"
        )
    for position, (name, allowed) in enumerate(FIELDS.items()):
        alone = [*("*" * position), texts[position], *("*" * (len(FIELDS) - position - 1))]
        try:
            CronSim(" ".join(alone), _ANY_YEAR)
        except (CronSimError, ValueError):
            raise ScheduleError(
                f"cron {cron!r}: the {name}, {texts[position]!r}, cannot be read; write numbers "
                f"from {allowed}, with , - / or *"
            ) from None
    try:
        next(CronSim(cron, _ANY_YEAR))
    except (CronSimError, StopIteration):
        raise ScheduleError(f"cron {cron!r}: there is no such day in any year") from None
    return " ".join(texts)


def check_timezone(name: str) -> str:
    """The name of a time zone.

    Raises:
        ScheduleError: there is none of this name; the message lists names that are close.
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
    remedy = f"did you mean {' or '.join(close)}?" if close else "write it as Europe/Berlin or UTC"
    raise ScheduleError(f"there is no time zone {name!r}; {remedy}")


def next_time(cron: str, timezone: str, after: datetime) -> datetime:
    """The first due time later than ``after``, in UTC."""
    rule = _Rule(cron, ZoneInfo(timezone))
    found = None
    for wall in CronSim(cron, rule.wall(after) - rule.margin):
        if found and wall > rule.wall(found) + rule.margin:
            return found
        later = [time for time in rule.instants(wall) if time > after]
        found = min(later if found is None else [*later, found], default=None)
    raise ScheduleError(f"cron {cron!r}: there is no such day in any year")


def last_times(
    cron: str, timezone: str, *, after: datetime, until: datetime, limit: int
) -> list[datetime]:
    """The due times later than ``after`` and not later than ``until``, in UTC, the oldest first.

    Of more than ``limit`` the latest are returned.
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
    """What an expression stands for; None if it uses ``L`` or ``#``, which have no numbers."""
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
    """All names, found by looking through folders, which takes a while."""
    return frozenset(zoneinfo.available_timezones())


def _unless_all(numbers: set[int], count: int) -> tuple[int, ...] | None:
    return None if len(numbers) == count else tuple(sorted(numbers))
