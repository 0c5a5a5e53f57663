"""The store: what is stored, what is refused, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.schedule.book import Book
from pipeline.errors import FolderBusyError, ScheduleError
from pipeline.storage.store import Store
from tests.jobs.schedule.conftest import at, night, schedule


def test_what_is_added_is_there_for_every_reader(book: Book) -> None:
    assert book.names() == []
    book.add(schedule("b", timezone="Europe/Berlin", retries=3))
    book.add(schedule("a"))
    there = Book(book.url)
    assert there.names() == ["a", "b"]
    assert there.get("b") == schedule("b", timezone="Europe/Berlin", retries=3)


def test_a_name_is_given_once_unless_it_shall_be_replaced(book: Book) -> None:
    book.add(schedule())
    with pytest.raises(ScheduleError, match="'facts' already exists; give --replace"):
        book.add(schedule(cron="0 3 * * *"))
    assert book.get("facts").cron == "0 2 * * *"
    book.add(schedule(cron="0 3 * * *"), replace=True)
    assert book.get("facts").cron == "0 3 * * *"


def test_an_unknown_name_is_answered_with_those_there_are(book: Book) -> None:
    with pytest.raises(ScheduleError, match="has no schedule 'x'; there is none yet"):
        book.get("x")
    book.add(schedule())
    with pytest.raises(ScheduleError, match=r"'\.\./facts'; there are facts"):
        book.get("../facts")


def test_a_night_is_written_once_and_read_back_the_latest_first(book: Book) -> None:
    first, second, third = (
        night(at("21 02:00"), 1, outcome="failed", exit_status=1),
        night(at("21 02:00"), 2, output=("promoted",)),
        night(at("22 02:00"), covers=(at("21 02:00"), at("22 02:00"))),
    )
    for one in (third, first, second, first.model_copy(update={"outcome": "done"})):
        book.end(one)
    assert list(book.nights("facts")) == [third, second, first]


def test_as_much_of_the_log_is_read_as_is_needed(book: Book) -> None:
    days = [night(at(f"{day} 02:00")) for day in range(10, 20)]
    failed = [night(at("20 02:00"), n, outcome="failed") for n in (1, 2)]
    for one in (*days, *failed):
        book.end(one)
    assert book.recent(schedule(retries=2)) == [days[-1], *failed]
    assert book.recent(schedule(retries=1)) == failed


def test_removing_keeps_the_log_unless_it_is_purged(book: Book) -> None:
    book.add(schedule())
    book.add(schedule("other"))
    book.end(night(at("21 02:00")))
    book.remove("facts")
    assert book.names() == ["other"]
    assert len(list(book.nights("facts"))) == 1
    book.remove("facts", purge=True)
    assert list(book.nights("facts")) == []
    assert book.names() == ["other"]
    with pytest.raises(ScheduleError, match="no schedule 'facts'"):
        book.remove("facts", purge=True)


def test_purging_leaves_files_of_the_users(book: Book) -> None:
    book.add(schedule())
    one = night(at("21 02:00"))
    book.end(one)
    store, mine = Store(book.url), ["logs/facts/mine.log", "nights/facts/notes.txt"]
    for name in (book.log_name(one), *mine):
        store.write_bytes(name, b"1")
    book.remove("facts", purge=True)
    assert store.list() == mine


def test_the_log_of_a_night_that_runs_is_not_purged(book: Book) -> None:
    book.add(schedule())
    with book.lease("facts"):
        with pytest.raises(FolderBusyError):
            book.lease("facts")
        with pytest.raises(ScheduleError, match="schedule 'facts' is running"):
            book.remove("facts", purge=True)
        book.add(schedule("other"))
        book.lease("other").release()
    assert book.get("facts") == schedule()


def test_runs_missed_while_disabled_are_skipped(book: Book) -> None:
    book.add(schedule())
    assert not book.enable("facts", False, at("21 00:00")).enabled
    again = book.enable("facts", True, at("24 08:00"))
    assert book.get("facts") == again
    assert (again.enabled, again.since) == (True, at("24 08:00"))
    assert book.enable("facts", True, at("25 08:00")).since == at("24 08:00")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    book = Book(str(tmp_path))
    book.add(schedule())
    file = tmp_path / "schedules" / "facts.json"
    file.write_text(file.read_text().replace("0 2 * * *", "0 99 * * *"))
    with pytest.raises(ScheduleError, match=r"facts.json is damaged.*the hour, '99'.*delete it"):
        book.get("facts")


@pytest.mark.parametrize("name", ["", "Facts", "1facts", "a/b", "..", "a-", "a" * 37, "a\n", "ä"])
def test_names_are_labels(name: str) -> None:
    with pytest.raises(ScheduleError, match="is not a valid schedule name"):
        schedule(name)
    assert schedule("a" * 36).name
