"""A service and a timer of systemd for one schedule.

The service asks the store what is due and runs that, so the timer need not be exact: besides the
schedule's own times it comes every hour, and finds what a change of clocks, a reboot or a runner
that died has left.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.schedule.cron import Fields, fields
from jobs.schedule.night import STOP_S
from jobs.schedule.records import Schedule
from pipeline.errors import ScheduleError

_REFRESH = "Description=Refresh of a language model: "
_EXPLANATION = (
    "# Finds what a change of clocks or a crash has left; does nothing if nothing is due."
)
MARKS = (_REFRESH, _EXPLANATION)
"""Lines that show that a unit file is ours, and may be written anew."""
_DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_OFTEN = "*:0/10"


def units(schedule: Schedule, store: str) -> dict[str, str]:
    """The units, by the names of their files.

    Args:
        schedule: the schedule.
        store: the store's absolute path or URL.

    Raises:
        ScheduleError: a path holds a line break or another control character.
    """
    command = [sys.executable, "-P", "-m", "jobs", "schedule", "run", "--once"]
    command += ["--store", store, schedule.name]
    directory = schedule.directory
    for text in (*command, directory or ""):
        if not text.isprintable():
            raise ScheduleError(f"{text!r} cannot stand in a unit file; choose another path")
    service = [
        "[Unit]",
        f"{_REFRESH}{schedule.name}",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=oneshot",
        *([f"WorkingDirectory={directory.replace('%', '%%')}"] if directory else []),
        f"ExecStart={' '.join(map(_quoted, command))}",
        # A model that the gates held back is an answer, not a fault of the service.
        "SuccessExitStatus=3",
        # The runner is told to stop, and tells the night.
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_S + 30:.0f}",
    ]
    timer = [
        "[Unit]",
        f"Description=When {schedule.name} is refreshed: {schedule.cron} {schedule.timezone}",
        "",
        "[Timer]",
        *(f"OnCalendar={time}" for time in calendar(schedule)),
        _EXPLANATION,
        "OnCalendar=hourly",
        "Persistent=true",
        "",
        "[Install]",
        "WantedBy=timers.target",
    ]
    name = f"pmet-{schedule.name}"
    return {f"{name}.service": _text(service), f"{name}.timer": _text(timer)}


def calendar(schedule: Schedule) -> list[str]:
    """Calendar events at the schedule's times; every ten minutes where they cannot be said."""
    parts = fields(schedule.cron)
    if parts is None:
        return [_OFTEN]
    days, weekdays = parts.days, parts.weekdays
    apart = parts.either_day and days is not None and weekdays is not None
    either = [(days, None), (None, weekdays)] if apart else [(days, weekdays)]
    return [_event(parts, *pair, schedule.timezone) for pair in either]


def _event(
    parts: Fields, days: Sequence[int] | None, weekdays: Sequence[int] | None, timezone: str
) -> str:
    names = "" if weekdays is None else ",".join(_DAYS[day] for day in weekdays) + " "
    date = f"*-{_numbers(parts.months)}-{_numbers(days)}"
    return f"{names}{date} {_numbers(parts.hours)}:{_numbers(parts.minutes)}:00 {timezone}"


def _numbers(numbers: Sequence[int] | None) -> str:
    return "*" if numbers is None else ",".join(f"{number:02d}" for number in numbers)


def _quoted(text: str) -> str:
    """An argument as systemd reads it: no variable, no specifier, one word."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
