"""The home: which version is in use, what may move CURRENT, and which versions are kept."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from jobs.refresh.home import CURRENT, LEDGER, NIGHT, CurrentMovedError, Home, path
from pipeline.errors import FactDumpError, RunFolderError


def version(home: Home, number: int, status: str = "promoted") -> str:
    """Create a version with a model of one file; return the model's location."""
    model = path(number, "model")
    home.store.write_bytes(f"{model}/config.json", b"{}")
    published = {"files": {"model/config.json": ""}}
    home.store.write_json(path(number, "records", "published.json"), published)
    home.store.write_json(path(number, NIGHT), {"status": status, "model": model})
    return model


def promoted(home: Home, *numbers: int) -> None:
    """Promote versions one after the other."""
    for expected, number in enumerate(numbers):
        version(home, number)
        home.promote(number, expected=expected, by="refresh")


def in_use(home: Home) -> int:
    """Return the version that the file CURRENT names."""
    return int(json.loads(home.store.read_bytes(CURRENT))["version"])


def test_a_promotion_is_visible_to_every_reader_of_the_home(any_url: str) -> None:
    home = Home(any_url)
    assert home.current() is None
    promoted(home, 1, 2)
    current = Home(any_url).current()
    assert current is not None
    assert (current.promotion, current.version, current.by) == (2, 2, "refresh")
    assert in_use(home) == 2


def test_of_many_who_follow_the_same_promotion_one_succeeds(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1)
    numbers = range(2, 10)
    for number in numbers:
        version(home, number)

    def attempt(number: int) -> bool:
        try:
            Home(any_url).promote(number, expected=1, by="refresh")
        except CurrentMovedError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = [n for n, ok in zip(numbers, threads.map(attempt, numbers), strict=True) if ok]
    assert won == [in_use(home)]


def test_a_process_that_promotes_too_late_learns_the_version_in_use(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1, 2)
    version(home, 3)
    with pytest.raises(CurrentMovedError, match="to version 2; version 3 is kept"):
        home.promote(3, expected=1, by="refresh")
    assert in_use(home) == 2


def test_a_death_before_the_file_was_written_is_repaired(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1)
    earlier = home.store.read_bytes(CURRENT)
    version(home, 2)
    home.promote(2, expected=1, by="refresh")
    home.store.write_bytes(CURRENT, earlier)
    home.write_current()
    assert in_use(home) == 2


def test_rolling_back_goes_to_the_version_in_use_before(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1, 2, 3)
    assert home.rollback().version == 2
    assert home.rollback(3).version == 3
    assert home.rollback().version == 2
    assert in_use(home) == 2


def test_only_kept_versions_can_be_rolled_back_to(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1, 2, 3)
    assert home.prune(2) == [1]
    for number in (1, 7):
        with pytest.raises(
            RunFolderError, match=f"no model of version {number}; kept versions: 2, 3"
        ):
            home.rollback(number)
    home.store.delete(path(2, "model"))
    with pytest.raises(RunFolderError, match="no version before version 3 to roll back to"):
        home.rollback()


def test_pruning_keeps_figures_and_deletes_models(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1, 2, 3, 4)
    home.store.write_json(path(1, "metrics.json"), {})
    version(home, 5, status="held")
    assert home.prune(2) == [1, 2]
    assert [n for n in home.versions() if home.is_kept(n)] == [3, 4, 5]
    assert home.store.exists(path(1, "metrics.json"))
    assert not home.store.list(path(1, "model"))
    assert home.prune(2) == []


def test_the_version_in_use_is_kept_however_old(any_url: str) -> None:
    home = Home(any_url)
    promoted(home, 1, 2, 3, 4)
    home.rollback(1)
    assert home.prune(1) == [2, 3]
    assert home.is_kept(1)


def test_the_last_word_on_a_fact_counts(any_url: str) -> None:
    home = Home(any_url)
    home.retract("Nice", "mayor", "retract", "asked for")
    home.retract("Lyon", "mayor", "retract")
    home.retract("Nice", "mayor", "restore")
    said = {key: r.action for key, r in home.retractions().items()}
    assert said == {("mayor", "Nice"): "restore", ("mayor", "Lyon"): "retract"}


def test_what_many_say_at_once_is_all_kept(any_url: str) -> None:
    home = Home(any_url)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: home.retract(f"city {i}", "mayor", "retract"), range(8)))
    assert len(home.retractions()) == 8


def test_a_fact_that_is_not_in_the_ledger_is_refused(tmp_path) -> None:
    home = Home(str(tmp_path))
    promoted(home, 1)
    ledger = pa.table({"relation": ["mayor"], "subject": ["Nice"]})
    home.store.write_table(path(1, LEDGER), ledger)
    home.refuse_unknown("Nice", "mayor", "retract")
    with pytest.raises(FactDumpError, match="no fact 'nice', 'mayor'; there is 'Nice', 'mayor'"):
        home.refuse_unknown("nice", "mayor", "retract")
    home.retract("Nice", "mayor", "retract")
    with pytest.raises(FactDumpError, match="retract was already recorded at"):
        home.refuse_unknown("Nice", "mayor", "retract")
    home.refuse_unknown("Nice", "mayor", "restore")


ODD = [float("nan"), float("inf"), -float("inf"), 1e300, 5e-324, 0.5, None, [1.0]]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("field", ["subject", "relation", "action", "reason", "at"])
def test_a_retraction_with_an_odd_number_is_refused_by_name(tmp_path, field, odd) -> None:
    home = Home(str(tmp_path))
    home.retract("Nice", "mayor", "retract", "asked for")
    (name,) = home.store.list("retractions")
    home.store.write_json(name, home.store.read_json(name) | {field: odd})
    with pytest.raises(
        RunFolderError, match=rf"{name} is not a valid retraction record .*\({field}: "
    ):
        home.retractions()


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("field", ["promotion", "version", "model", "at", "by"])
def test_a_promotion_with_an_odd_number_is_refused_by_name(tmp_path, field, odd) -> None:
    home = Home(str(tmp_path))
    promoted(home, 1)
    (name,) = home.store.list("promotions")
    home.store.write_json(name, home.store.read_json(name) | {field: odd})
    with pytest.raises(
        RunFolderError, match=rf"{name} is not a valid promotion record .*\({field}: "
    ):
        home.current()


def test_another_folder_is_no_home(tmp_path) -> None:
    with pytest.raises(RunFolderError, match="is not a home folder"):
        Home.open(str(tmp_path))


def test_discarding_a_version_leaves_files_of_the_users(any_url: str) -> None:
    home = Home(any_url)
    token = "0123456789abcdef" * 2
    made = ("run.json", "results.parquet", f"targets/00000-{token}.parquet", "ledger.parquet")
    mine = ("model/notes.txt", "targets/facts.parquet", "delta/x", "notes.txt")
    for name in (*made, *mine):
        home.store.write_bytes(path(9, name), b"1")
    home.discard(9)
    assert home.store.list(path(9)) == sorted(path(9, name) for name in mine)
