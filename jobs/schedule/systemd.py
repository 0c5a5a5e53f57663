"""Generates a systemd service and timer for one schedule.

The service runs whatever the store says is due, so the timer need not be exact. Besides the
schedule's own times it fires every hour, to pick up what a clock change, a reboot or a dead runner
left behind.
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
"""Lines that mark a unit file as ours, so that it may be overwritten."""
_DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_OFTEN = "*:0/10"


def units(schedule: Schedule, store: str) -> dict[str, str]:
    """Return the units by file name.

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
            raise ScheduleError(f"{text!r} cannot be written into a unit file; choose another path")
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
        # A model held back by the gates is a result, not a failure of the service.
        "SuccessExitStatus=3",
        # SIGTERM goes to the runner, which then stops the run.
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
    """Return calendar events for the schedule; every ten minutes if systemd cannot express it."""
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
    """Quote an argument for systemd: one word, without variables or specifiers."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
