"""Due times: what the fields mean, and what happens when clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.schedule.cron import check_cron, check_timezone, fields, last_times, next_time
from pipeline.errors import ScheduleError

BERLIN = ZoneInfo("Europe/Berlin")


def berlin(cron: str, start: datetime, days: int) -> list[str]:
    """Return due times from a local midnight on, in Berlin's wall-clock time."""
    times, now = [], start.replace(tzinfo=BERLIN).astimezone(UTC) - timedelta(seconds=1)
    end = (start + timedelta(days=days)).replace(tzinfo=BERLIN)
    while (now := next_time(cron, "Europe/Berlin", now)) < end:
        times.append(f"{now.astimezone(BERLIN):%d %H:%M %Z}")
    return times


@pytest.mark.parametrize(
    ("day", "name"), [("0", "Sun"), ("7", "Sun"), ("1", "Mon"), ("SAT", "Sat")]
)
def test_days_of_the_week_are_those_of_cron(day: str, name: str) -> None:
    due = next_time(f"0 2 * * {day}", "UTC", datetime(2026, 11, 24, tzinfo=UTC))
    assert due.strftime("%a %H:%M") == f"{name} 02:00"


def test_the_zone_decides_what_hour_it_is() -> None:
    now = datetime(2026, 7, 1, tzinfo=UTC)
    assert next_time("0 2 * * *", "Asia/Kolkata", now).strftime("%H:%M") == "20:30"
    assert next_time("0 2 * * *", "Europe/Berlin", now).strftime("%d %H:%M") == "02 00:00"


def test_a_time_that_clocks_skip_comes_with_the_first_that_exists() -> None:
    assert berlin("30 2 * * *", datetime(2026, 3, 28), 3) == [
        "28 02:30 CET",
        "29 03:00 CEST",
        "30 02:30 CEST",
    ]


def test_a_time_that_comes_twice_counts_once() -> None:
    assert berlin("30 2 * * *", datetime(2026, 10, 24), 3) == [
        "24 02:30 CEST",
        "25 02:30 CEST",
        "26 02:30 CET",
    ]
    # During the repeated hour the next time is never in the past.
    for minutes in range(0, 121, 10):
        now = datetime(2026, 10, 25, 0, 30, tzinfo=UTC) + timedelta(minutes=minutes)
        assert next_time("30 2 * * *", "Europe/Berlin", now) > now + timedelta(hours=20)


def test_every_half_hour_goes_by_elapsed_time() -> None:
    assert len(berlin("*/30 * * * *", datetime(2026, 3, 29), 1)) == 46
    assert len(berlin("*/30 * * * *", datetime(2026, 10, 25), 1)) == 50


def test_clocks_that_change_by_half_an_hour() -> None:
    # On Lord Howe Island 02:00 +11:00 is 01:30 +10:30.
    now = datetime(2026, 4, 4, 13, tzinfo=UTC)
    hours = []
    for _ in range(3):
        now = next_time("0 */3 * * *", "Australia/Lord_Howe", now)
        hours.append(now.astimezone(ZoneInfo("Australia/Lord_Howe")).strftime("%H:%M %z"))
    assert hours == ["03:00 +1030", "06:00 +1030", "09:00 +1030"]


def test_a_day_that_a_country_left_out() -> None:
    # Samoa skipped 30 December 2011.
    due = next_time("0 2 30 12 *", "Pacific/Apia", datetime(2011, 12, 29, tzinfo=UTC))
    assert due == datetime(2011, 12, 30, 10, tzinfo=UTC)
    assert due.astimezone(ZoneInfo("Pacific/Apia")).strftime("%d %H:%M") == "31 00:00"


CRONS = [
    "30 2 * * *",
    "0 3 * * *",
    "15 1,2 * * 0",
    "*/20 * * * *",
    "0 */3 * * *",
    "59 23 28-31 * *",
]


@given(
    st.sampled_from(CRONS),
    st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/St_Johns"]),
    st.sampled_from([datetime(2026, month, 28, tzinfo=UTC) for month in (3, 10)]),
    st.integers(0, 24 * 60 * 9),
    st.integers(1, 24 * 60 * 3),
)
@settings(deadline=None)
@example("0 */3 * * *", "Australia/Lord_Howe", datetime(2026, 3, 28, tzinfo=UTC), 6750, 4320)
def test_looking_back_finds_what_looking_ahead_finds(
    cron: str, timezone: str, base: datetime, minutes: int, length: int
) -> None:
    after = base + timedelta(minutes=minutes)
    until = after + timedelta(minutes=length)
    ahead, now = [], after
    while (now := next_time(cron, timezone, now)) <= until:
        ahead.append(now)
    assert last_times(cron, timezone, after=after, until=until, limit=1000) == ahead
    assert last_times(cron, timezone, after=after, until=until, limit=2) == ahead[-2:]


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("0 2 * *", r"has 4 fields, not five: minute, hour, day-of-month, month, day-of-week;"),
        ("0 0 2 * * *", "has 6 fields, not five"),
        ("@daily", "has 1 fields.*for example '0 2"),
        ("61 2 * * *", "the minute, '61', is invalid; write numbers from 0 to 59"),
        ("0 24 * * *", "the hour, '24',"),
        ("0 2 0 * *", "the day-of-month, '0',"),
        ("0 2 * 13 *", "the month, '13',"),
        ("0 2 * * 8", "the day-of-week, '8', .*0 and 7 are Sunday"),
        ("0 2 * * ²", "the day-of-week"),
        ("0 2 30 2 *", "no year has such a day"),
    ],
)
def test_the_error_about_a_bad_expression_names_the_field(cron: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_cron(cron)


def test_spaces_do_not_count() -> None:
    assert check_cron(" 0  2 * * mon-fri ") == "0 2 * * mon-fri"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Berlin", r"did you mean Europe/Berlin\?"),
        ("europe/berlin", r"did you mean Europe/Berlin\?"),
        ("Europe/Berln", "Europe/Berlin"),
        ("new york", "America/New_York"),
        ("../../etc/passwd", "there is no time zone"),
        ("qqqqqqqq", "write it like Europe/Berlin or UTC"),
    ],
)
def test_an_unknown_zone_gets_close_names(name: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_timezone(name)
    assert check_timezone("Europe/Berlin") == "Europe/Berlin"


def test_fields_are_numbers_and_either_day_is_crons() -> None:
    found = fields("*/20 2 1,15 * 7")
    assert found is not None
    assert (found.minutes, found.hours, found.months) == ((0, 20, 40), (2,), None)
    assert (found.days, found.weekdays, found.either_day) == ((1, 15), (0,), True)
    both = fields("0 2 */2 * MON")
    assert both is not None
    assert not both.either_day
    # Any day of the month, or Monday: any day.
    any_day = fields("0 2 1-31 * MON")
    assert any_day is not None
    assert (any_day.days, any_day.weekdays) == (None, None)
    assert fields("0 2 L * *") is None
    assert fields("0 2 * * MON#2") is None
