"""The next run of a schedule, derived from the schedule and its log."""

from __future__ import annotations

from datetime import timedelta

from jobs.schedule.due import MAX_COVERS, MAX_DEATHS, next_task
from tests.jobs.schedule.conftest import START, at, night, schedule


def test_a_new_schedule_waits_for_its_first_time() -> None:
    task = next_task(schedule(), [], START)
    assert task is not None
    assert (task.due, task.at, task.covers) == (at("21 02:00"),) * 2 + ((at("21 02:00"),),)
    assert next_task(schedule(enabled=False), [], at("24 02:00")) is None


def test_a_night_is_due_from_its_very_minute_and_until_it_is_done() -> None:
    due = at("21 02:00")
    before = next_task(schedule(), [], due - timedelta(seconds=1))
    task = next_task(schedule(), [], due)
    assert before is not None
    assert task is not None
    assert before == task
    assert task.at == due
    done = next_task(schedule(), [night(due)], due + timedelta(minutes=30))
    assert done is not None
    assert done.at == at("22 02:00")


def test_one_run_covers_all_missed_ones() -> None:
    task = next_task(schedule(), [night(at("21 02:00"))], at("24 09:00"))
    assert task is not None
    assert task.covers == (at("22 02:00"), at("23 02:00"), at("24 02:00"))
    assert (task.due, task.attempt, task.is_late) == (at("24 02:00"), 1, False)
    after = next_task(schedule(), [night(task.due, covers=task.covers)], at("24 09:30"))
    assert after is not None
    assert after.covers == (at("25 02:00"),)


def test_without_catch_up_a_late_run_is_left_out() -> None:
    strict = schedule(catch_up="never")
    late, soon = (next_task(strict, [], at(t)) for t in ("21 03:01", "21 02:59"))
    assert late is not None
    assert soon is not None
    assert (late.is_late, soon.is_late) == (True, False)
    # A retry's lateness counts its wait, not the duration of the run.
    failed = night(at("21 02:00"), outcome="failed", finished=at("21 08:00"))
    retry = next_task(strict, [failed], at("21 08:10"))
    assert retry is not None
    assert (retry.attempt, retry.is_late) == (2, False)


def test_a_failed_night_is_tried_again_later_and_later() -> None:
    due, retries = at("21 02:00"), schedule(retries=6)
    log, waits = [], []
    for attempt in range(1, 7):
        log.append(night(due, attempt, outcome="failed", exit_status=1))
        task = next_task(retries, log, at("21 04:00"))
        assert task is not None
        assert (task.due, task.attempt) == (due, attempt + 1)
        waits.append((task.at - (log[-1].finished or due)) / timedelta(minutes=1))
    assert waits == [5, 10, 20, 40, 60, 60]
    log.append(night(due, 7, outcome="failed", exit_status=1))
    done = next_task(retries, log, at("21 04:00"))
    assert done is not None
    assert done.due == at("22 02:00")


def test_what_cannot_go_better_is_not_tried_again() -> None:
    for outcome in ("bad input", "held back", "left out"):
        task = next_task(
            schedule(retries=5), [night(at("21 02:00"), outcome=outcome)], at("21 04:00")
        )
        assert task is not None
        assert task.due == at("22 02:00")


def test_an_interrupted_night_is_due_at_once() -> None:
    log = [night(at("21 02:00"), 1, outcome="interrupted")] * 5
    task = next_task(schedule(retries=0), log, at("21 02:11"))
    assert task is not None
    assert (task.due, task.at) == (at("21 02:00"), at("21 02:10"))


def test_a_night_that_kills_its_runner_is_given_up() -> None:
    log = [night(at("21 02:00"), n + 1, outcome="died", finished=None) for n in range(MAX_DEATHS)]
    again, given_up = (
        next_task(schedule(retries=0), log[:n], at("21 03:00"))
        for n in (MAX_DEATHS - 1, MAX_DEATHS)
    )
    assert again is not None
    assert given_up is not None
    assert (again.due, given_up.due) == (at("21 02:00"), at("22 02:00"))


def test_the_next_night_stands_for_one_that_still_waits() -> None:
    failed = night(at("21 02:00"), outcome="failed", finished=at("22 01:59"))
    task = next_task(schedule(retries=3), [failed], at("22 02:00"))
    assert task is not None
    assert (task.covers, task.attempt) == ((at("21 02:00"), at("22 02:00")), 1)


def test_what_was_due_before_it_was_added_or_enabled_does_not_count() -> None:
    task = next_task(schedule(since=at("24 08:00")), [], at("24 09:00"))
    assert task is not None
    assert task.covers == (at("25 02:00"),)


def test_years_of_minutes_are_looked_through_in_no_time() -> None:
    task = next_task(schedule(cron="* * * * *"), [], START + timedelta(days=4000))
    assert task is not None
    assert len(task.covers) == MAX_COVERS
    assert task.due == START + timedelta(days=4000)


def test_a_log_of_a_machine_whose_clock_is_ahead_is_believed() -> None:
    task = next_task(schedule(), [night(at("21 02:00"))], at("21 01:59"))
    assert task is not None
    assert task.due == at("22 02:00")
