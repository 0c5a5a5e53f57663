"""systemd units: their content, and that systemd accepts it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.schedule.cron import next_time
from jobs.schedule.systemd import calendar, units
from pipeline.errors import ScheduleError
from tests.jobs.schedule.conftest import schedule

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


def analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("cron", "events"),
    [
        ("30 2 * * *", ["*-*-* 02:30:00 Europe/Berlin"]),
        ("0 2 * * 0", ["Sun *-*-* 02:00:00 Europe/Berlin"]),
        ("*/30 1,2 * 6 *", ["*-06-* 01,02:00,30:00 Europe/Berlin"]),
        # If both days are given, cron matches either, while systemd would require both.
        (
            "0 2 1 * MON",
            ["*-*-01 02:00:00 Europe/Berlin", "Mon *-*-* 02:00:00 Europe/Berlin"],
        ),
        ("0 2 L * *", ["*:0/10"]),
    ],
)
def test_times_are_converted_to_calendar_events(cron: str, events: list[str]) -> None:
    assert calendar(schedule(cron=cron, timezone="Europe/Berlin")) == events


@needs_systemd
@pytest.mark.parametrize(
    "cron", ["30 2 * * *", "0 2 * * 7", "*/20 3 1 * *", "5 */6 * 2,8 1-5", "0 2 */10 * MON"]
)
def test_systemd_finds_the_next_time_that_cron_finds(cron: str) -> None:
    (event,) = calendar(schedule(cron=cron, timezone="America/New_York"))
    shown = analyze("calendar", "--base-time=2026-11-24 12:00:00 UTC", event)
    found = re.search(r"(?:\(in UTC\)|Next elapse): \w+ (\S+ \S+) UTC", shown)
    assert found, shown
    assert next_time(cron, "America/New_York", NOW) == datetime.fromisoformat(f"{found[1]}+00:00")


def written(folder: Path, **values: Any) -> dict[str, str]:
    texts = units(schedule(**values), "s3://bucket/schedules")
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    odd = tmp_path / 'a "b" 50% $HOME \\ c'
    odd.mkdir()
    written(tmp_path, directory=str(odd), cron="0 2 1 * MON", timezone="Europe/Berlin")
    analyze("verify", *map(str, tmp_path.glob("pmet-facts.*")))


def test_the_service_runs_what_is_due_of_this_schedule(tmp_path: Path) -> None:
    texts = written(tmp_path, directory="/100%/x")
    assert sorted(texts) == ["pmet-facts.service", "pmet-facts.timer"]
    service, timer = texts["pmet-facts.service"], texts["pmet-facts.timer"]
    assert f'ExecStart="{sys.executable}" "-P" "-m" "jobs" "schedule" "run" "--once"' in service
    assert service.splitlines()[8].endswith('"--store" "s3://bucket/schedules" "facts"')
    assert "WorkingDirectory=/100%%/x\n" in service
    assert "Type=oneshot\n" in service
    for line in ("OnCalendar=*-*-* 02:00:00 UTC", "OnCalendar=hourly", "Persistent=true"):
        assert f"\n{line}\n" in timer


def test_nothing_can_be_smuggled_into_a_unit() -> None:
    with pytest.raises(ScheduleError, match="cannot be written into a unit file"):
        units(schedule(), "s3://bucket/x\nExecStartPre=/bin/evil")
    service = units(schedule(), 's3://b/$HOME%h" "\\')["pmet-facts.service"]
    assert '"s3://b/$$HOME%%h\\" \\"\\\\" "facts"' in service
