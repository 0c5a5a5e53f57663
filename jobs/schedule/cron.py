"""When a cron expression is due, in a time zone.

The times are those of Debian's cron. Where clocks are put forward, a time that does not exist
that day comes with the next minute that does; where they are put back, a time that comes twice
counts once, the first time. Expressions whose minute or hour begins with ``*`` go by elapsed
time instead: ``*/30 * * * *`` comes every half hour of such a day, too.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import zoneinfo
from collections.abc import Iterator
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
# Clocks are put back by less than this anywhere.
_FOLD = timedelta(hours=3)


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
    # Within a repeated hour the first answers are those of its first pass.
    times = _times(cron, after.astimezone(ZoneInfo(timezone)))
    return next(time for time in times if time > after)


def last_times(
    cron: str, timezone: str, *, after: datetime, until: datetime, limit: int
) -> list[datetime]:
    """The due times later than ``after`` and not later than ``until``, in UTC, the oldest first.

    Of more than ``limit`` the latest are returned.
    """
    start = (until + _FOLD).astimezone(ZoneInfo(timezone))
    times = itertools.takewhile(lambda t: t > after, _times(cron, start, reverse=True))
    due = itertools.islice((time for time in times if time <= until), limit)
    return sorted(due)


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


def _times(cron: str, start: datetime, *, reverse: bool = False) -> Iterator[datetime]:
    return (time.astimezone(UTC) for time in CronSim(cron, start, reverse=reverse))


def _unless_all(numbers: set[int], count: int) -> tuple[int, ...] | None:
    return None if len(numbers) == count else tuple(sorted(numbers))
