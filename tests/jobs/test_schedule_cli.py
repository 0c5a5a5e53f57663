"""``pmet schedule`` on the command line."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from jobs import schedule_cli
from jobs.schedule.book import Book
from jobs.schedule.records import Schedule
from tests.jobs.conftest import Invoke
from tests.jobs.schedule.conftest import at, night, schedule


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PMET_SCHEDULES", str(tmp_path / "store"))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    for console in (schedule_cli.out, schedule_cli.err):
        monkeypatch.setattr(console, "width", 200)
    (tmp_path / "refresh.yaml").write_text("facts: x\n")
    return tmp_path


@pytest.fixture
def schedules(pmet: Invoke, folder: Path) -> Invoke:
    """Run ``pmet schedule``; return exit status, output and error output."""
    return partial(pmet, "schedule")


def stored(folder: Path, name: str = "facts") -> Schedule:
    return Book(str(folder / "store")).get(name)


def test_help_says_what_there_is(schedules: Invoke, pmet: Invoke) -> None:
    assert "schedule" in pmet("--help")[1]
    _, out, _ = schedules("--help")
    commands = ("add", "list", "log", "remove", "enable", "disable", "run", "systemd")
    for command in (*commands, "kubernetes"):
        assert command in out
        assert schedules(command, "--help")[0] == 0


def test_a_schedule_from_its_first_day_to_its_last(schedules: Invoke, folder: Path) -> None:
    status, out, _ = schedules("add", "facts", "refresh.yaml", "--timezone", "Europe/Berlin")
    assert status == 0
    assert "facts: next due 20" in out
    kept = stored(folder)
    assert (kept.refresh, kept.directory) == (str(folder / "refresh.yaml"), str(folder))
    assert (kept.cron, kept.timezone, kept.catch_up) == ("0 2 * * *", "Europe/Berlin", "once")
    assert kept.since == kept.added_at

    status, out, _ = schedules("list")
    for text in ("facts", "0 2 * * *", "Europe/Berlin", ":00 UTC", "none yet"):
        assert text in out
    book = Book(str(folder / "store"))
    failed = night(at("23 01:00"), covers=(at("22 01:00"), at("23 01:00")), outcome="failed")
    book.end(failed.model_copy(update={"exit_status": 1, "output": ("[red]no room",)}))
    book.end(night(at("23 01:00"), 2, log="logs/facts/x.log"))
    assert "done, due 2026-11-23 01:00 UTC" in schedules("list")[1]
    _, out, _ = schedules("log", "facts")
    for text in ("2 runs", "failed (exit status 1)", "10 min 00 s", "[red]no room", "there"):
        assert text in out
    assert f"output of the last one: {folder}/store/logs/facts/x.log" in out
    lines = schedules("log", "facts", "--json", "--limit", "1")[1].splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [2]

    assert schedules("disable", "facts")[1] == "facts: disabled\n"
    assert "disabled" in schedules("list")[1]
    assert schedules("enable", "facts")[1] == "facts: enabled\n"
    assert stored(folder).enabled
    assert schedules("remove", "facts")[1] == "facts: removed\n"
    assert "no schedules in" in schedules("list")[1]
    assert "failed" in schedules("log", "facts")[1]
    assert schedules("remove", "facts", "--purge")[0] == 0
    assert schedules("log", "facts")[0] == 2


def test_the_store_may_be_anywhere(schedules: Invoke, folder: Path) -> None:
    url = "memory://schedules-cli/store"
    assert schedules("add", "far", "refresh.yaml", "--store", url)[0] == 0
    assert Book(url).names() == ["far"]
    assert "far" in schedules("list", "--store", url)[1]
    assert not (folder / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["facts", "no.yaml"], "refresh file: cannot read no.yaml"),
        (["Facts", "refresh.yaml"], "'Facts' is not a valid schedule name; use lower-case"),
        (["facts", "refresh.yaml", "--cron", "0 25 * * *"], "the hour, '25', is invalid"),
        (["facts", "refresh.yaml", "--timezone", "Berlin"], "did you mean Europe/Berlin?"),
        (["facts", "refresh.yaml", "--catch-up", "twice"], "neither once nor never"),
    ],
)
def test_bad_input_is_reported_and_changes_nothing(
    schedules: Invoke, folder: Path, arguments: list[str], message: str
) -> None:
    status, out, err = schedules("add", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert Book(str(folder / "store")).names() == []


def test_units_and_objects_are_written_for_what_is_in_the_store(
    schedules: Invoke, folder: Path
) -> None:
    schedules("add", "facts", "refresh.yaml")
    assert schedules("systemd", "facts", "--output", folder / "units")[0] == 0
    units = {path.name: path.read_text() for path in (folder / "units").iterdir()}
    assert sorted(units) == ["pmet-facts.service", "pmet-facts.timer"]
    assert f'"--store" "{folder}/store" "facts"' in units["pmet-facts.service"]
    assert units["pmet-facts.timer"] in schedules("systemd", "facts")[1]
    status, out, _ = schedules("kubernetes", "facts", "--image", "registry/pmet:1")
    assert (status, out.count("\nkind: CronJob\n")) == (0, 1)
    assert schedules("kubernetes", "facts", "--image", "a b")[0] == 2


def test_run_once_has_the_exit_status_of_the_night(schedules: Invoke, folder: Path) -> None:
    book = Book(str(folder / "store"))
    # The run itself fails, because its working folder does not exist.
    book.add(schedule(retries=0, directory=str(folder / "gone")))
    status, _, err = schedules("run", "--once")
    assert status == 1
    assert "the run due" in err
    assert schedules("run", "--once")[0] == 0
    assert schedules("run", "--once", "nobody")[0] == 2


def test_a_signal_ends_the_runner_well(schedules: Invoke, folder: Path) -> None:
    def stop_once_it_listens() -> None:
        while "Clock" not in getattr(signal.getsignal(signal.SIGTERM), "__qualname__", ""):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_once_it_listens)
    stopper.start()
    status, _, err = schedules("run")
    stopper.join()
    assert status == 0
    assert f"running the schedules of {folder}/store" in err
    assert err.endswith("stopped\n")
