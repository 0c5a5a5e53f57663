"""The runner: what it runs, when, and what it logs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.schedule import runner as runner_module
from jobs.schedule.book import Book
from jobs.schedule.due import MAX_DEATHS
from jobs.schedule.night import Clock
from jobs.schedule.records import Night
from jobs.schedule.runner import Runner
from pipeline.errors import LeaseLostError, ScheduleError, StorageError
from tests.jobs.schedule.conftest import Nights, TestClock, at, night, schedule

Make = Callable[..., tuple[Runner, TestClock, list[str]]]


def log(book: Book, name: str = "facts") -> list[Night]:
    return list(book.nights(name))[::-1]


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll the store less often, so that days pass quickly."""
    monkeypatch.setattr(runner_module, "POLL", timedelta(hours=1))


@pytest.mark.usefixtures("rarely")
def test_it_waits_for_each_night_and_runs_it_once(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule())
    runner, clock, said = make_runner(at("20 12:00"), until=at("23 12:00"))
    runner.serve()
    assert [when for _, when in nights.begun] == [at("21 02:00"), at("22 02:00"), at("23 02:00")]
    done = log(book)
    assert [(n.due, n.outcome, n.attempt) for n in done] == [
        (when, "done", 1) for _, when in nights.begun
    ]
    assert done[0].finished == at("21 02:10")
    assert (done[0].exit_status, done[0].output) == (0, ("one", "two"))
    assert done[0].log is not None
    with book._store.read_stream(done[0].log) as stream:
        assert stream.read() == b"one\ntwo\n"
    assert book.running("facts") is None
    assert said[:2] == [
        "facts: the run due 2026-11-21 02:00 UTC starts",
        "facts: the run due 2026-11-21 02:00 UTC: done",
    ]
    assert clock.waits <= 3 * 24 + 10


def test_three_missed_runs_become_one(book: Book, nights: Nights, make_runner: Make) -> None:
    book.add(schedule())
    runner, _, said = make_runner(at("23 09:00"))
    assert runner.run_due() == 0
    (only,) = log(book)
    assert only.covers == (at("21 02:00"), at("22 02:00"), at("23 02:00"))
    assert "also covers 2 missed runs" in said[0]
    assert runner.run_due() == 0
    assert len(nights.begun) == 1


def test_a_skipped_late_run_is_in_the_log(book: Book, nights: Nights, make_runner: Make) -> None:
    book.add(schedule(catch_up="never"))
    runner, _, _ = make_runner(at("23 09:00"))
    assert runner.run_due() == 0
    assert nights.begun == []
    (only,) = log(book)
    assert (only.outcome, len(only.covers), only.log) == ("left out", 3, None)


def test_a_failure_is_tried_again_after_a_while(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule(retries=2))
    nights.statuses = [1, -9, 0]
    runner, _, _ = make_runner(at("21 02:00"))
    assert runner.run_due() == 0
    assert [when for _, when in nights.begun] == [at("21 02:00"), at("21 02:15"), at("21 02:35")]
    assert [n.words for n in log(book)] == [
        "failed (exit status 1)",
        "failed (killed by signal 9)",
        "done",
    ]


@pytest.mark.parametrize(
    ("statuses", "exit_status", "tries"), [([1, 1], 1, 2), ([2], 2, 1), ([3], 3, 1), ([7, 0], 0, 2)]
)
def test_the_exit_status_is_the_nights(
    book: Book,
    nights: Nights,
    make_runner: Make,
    statuses: list[int | Callable[[], int]],
    exit_status: int,
    tries: int,
) -> None:
    book.add(schedule(retries=1))
    nights.statuses = list(statuses)
    runner, clock, _ = make_runner(at("21 02:00"))
    assert runner.run_due() == exit_status
    assert len(nights.begun) == tries
    clock.time = at("21 23:00")
    assert runner.run_due() == 0
    assert len(nights.begun) == tries


@pytest.mark.usefixtures("rarely")
def test_schedules_come_and_go_while_it_runs(book: Book, nights: Nights, make_runner: Make) -> None:
    book.add(schedule("first"))

    def change() -> int:
        book.remove("first")
        book.add(schedule("second", cron="0 5 * * *"))
        return 0

    nights.statuses = [change]
    runner, _, _ = make_runner(at("20 12:00"), until=at("22 12:00"))
    runner.serve()
    assert nights.begun == [
        ("first", at("21 02:00")),
        ("second", at("21 05:00")),
        ("second", at("22 05:00")),
    ]
    assert len(log(book, "first")) == 1


def test_only_the_schedules_that_are_named_are_run(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule("mine"))
    book.add(schedule("other"))
    runner, _, _ = make_runner(at("21 02:00"), names=("mine",))
    runner.run_due()
    assert [name for name, _ in nights.begun] == ["mine"]
    with pytest.raises(ScheduleError, match="no schedule 'nobody'"):
        make_runner(at("21 02:00"), names=("nobody",))[0].run_due()


def test_of_many_runners_one_runs_the_night(book: Book, nights: Nights, make_runner: Make) -> None:
    book.add(schedule())
    inside, most, lock = 0, 0, threading.Lock()
    barrier = threading.Barrier(4)

    def run() -> int:
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        # The others try while this one runs.
        threading.Event().wait(0.3)
        with lock:
            inside -= 1
        return 0

    nights.statuses = [run] * 4
    runners = [make_runner(at("21 02:00"))[0] for _ in range(4)]

    def start(runner: Runner) -> None:
        barrier.wait()
        for _ in range(20):
            runner.run_due()

    threads = [threading.Thread(target=start, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(nights.begun), most) == (1, 1)
    assert len(log(book)) == 1


def test_a_night_of_another_runner_is_waited_for_without_hurry(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule())
    runner, clock, said = make_runner(at("21 02:00"), until=at("21 02:10"))
    with book.lease("facts"):
        runner.serve()
    assert nights.begun == []
    assert clock.waits <= 21
    assert len(said) == 1
    assert "not run here because another runner holds it" in said[0]


def test_a_run_whose_runner_died_is_repeated_and_both_are_in_the_log(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule(retries=0))
    book.begin(night(at("21 02:00"), finished=None, outcome="running"))
    runner, _, _ = make_runner(at("21 04:00"))
    assert runner.run_due() == 0
    assert [(n.outcome, n.attempt, n.host == "there") for n in log(book)] == [
        ("died", 1, True),
        ("done", 2, False),
    ]


def test_a_night_that_kills_its_runner_is_given_up(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule(retries=0))

    def killed() -> int:
        raise SystemExit

    nights.statuses = [killed] * 9
    for _ in range(9):
        try:
            make_runner(at("21 04:00"))[0].run_due()
        except SystemExit:
            continue
    assert len(nights.begun) == MAX_DEATHS
    assert [n.outcome for n in log(book)] == ["died"] * MAX_DEATHS


def test_a_stopped_night_is_interrupted_and_due_at_the_next_start(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule())
    runner, clock, _ = make_runner(at("21 02:00"))

    def stop() -> int:
        clock.stop()
        return -15

    nights.statuses = [stop]
    runner.serve()
    assert [n.outcome for n in log(book)] == ["interrupted"]
    again, _, _ = make_runner(at("21 02:20"))
    assert again.run_due() == 0
    assert [(n.outcome, n.attempt) for n in log(book)] == [("interrupted", 1), ("done", 2)]


def test_a_stop_that_comes_with_the_end_changes_nothing(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule())
    runner, clock, _ = make_runner(at("21 02:00"))
    nights.statuses = [lambda: clock.stop() or 0]  # type: ignore[func-returns-value]
    runner.serve()
    assert [n.outcome for n in log(book)] == ["done"]


def test_a_lost_lease_leaves_the_log_to_the_other(
    book: Book, nights: Nights, make_runner: Make
) -> None:
    book.add(schedule())

    def lose() -> int:
        raise LeaseLostError("taken over by another")

    nights.statuses = [lose]
    runner, _, said = make_runner(at("21 02:00"))
    assert runner.run_due() == 0
    assert log(book) == []
    assert said[-1] == "facts: taken over by another"


def test_an_unreachable_store_is_reported_once_and_waited_for(
    book: Book, nights: Nights, make_runner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    book.add(schedule())
    runner, clock, said = make_runner(at("21 02:00"), until=at("21 05:00"))
    names, end = book.names, book.end

    def unreachable() -> list[str]:
        if clock.now() < at("21 03:00"):
            raise StorageError("the store is out of reach")
        return names()

    def full(night: Night) -> None:
        if clock.now() < at("21 04:00"):
            raise StorageError("the store is full")
        end(night)

    monkeypatch.setattr(book, "names", unreachable)
    monkeypatch.setattr(book, "end", full)
    runner.serve()
    assert [n.outcome for n in log(book)] == ["done"]
    assert len(nights.begun) == 1
    assert said.count("the store is out of reach") == 1
    assert sum("not yet in the log: the store is full" in line for line in said) == 1


def test_a_damaged_schedule_does_not_stop_the_others(tmp_path: Path, nights: Nights) -> None:
    book = Book(str(tmp_path))
    book.add(schedule("good"))
    (tmp_path / "schedules" / "bad.json").write_text("{")
    said: list[str] = []
    clock = TestClock(at("21 02:00"), at("21 02:30"))
    Runner(book, clock=clock, say=said.append, command=lambda s: [s.name]).serve()
    assert [name for name, _ in nights.begun] == ["good"]
    assert sum("bad.json is damaged" in line for line in said) == 1


def test_what_cannot_be_started_has_failed(tmp_path: Path) -> None:
    book = Book(str(tmp_path))
    book.add(schedule(retries=0, directory=str(tmp_path / "gone")))
    clock = TestClock(at("21 02:00"))
    assert Runner(book, clock=clock, say=lambda _: None).run_due() == 1
    (only,) = log(book)
    assert only.outcome == "failed"
    assert "cannot be started" in only.output[0]
    assert "gone" in only.output[0]


def test_output_that_cannot_be_stored_costs_only_the_output(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book("memory://lost-output/store")
    book.add(schedule())

    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(type(book._store.fs), "put_file", refuse)
    said: list[str] = []
    clock = TestClock(at("21 02:00"))
    assert Runner(book, clock=clock, say=said.append, command=lambda s: [s.name]).run_due() == 0
    (only,) = log(book)
    assert (only.outcome, only.log, only.output) == ("done", None, ("one", "two"))
    assert "the output of the run is lost" in said[1]


def test_a_real_night_under_a_real_clock(tmp_path: Path) -> None:
    book = Book(str(tmp_path))
    now = datetime.now(UTC)
    book.add(schedule(cron="* * * * *", since=now - timedelta(minutes=2), retries=0))
    runner = Runner(
        book, clock=Clock(), say=lambda _: None, command=lambda _: ["sh", "-c", "echo hi; exit 3"]
    )
    assert runner.run_due() == 3
    (only,) = log(book)
    assert (only.words, only.exit_status, only.output) == ("held back", 3, ("hi",))
    assert only.finished is not None
    assert only.started <= only.finished
