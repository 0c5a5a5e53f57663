"""What a night tells its run: which figures it is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.refresh.config import RefreshConfig
from jobs.refresh.home import Home, path
from jobs.refresh.night import job_of


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Two versions that were promoted, and a third that a gate held back."""
    home = Home(str(tmp_path / "home"))
    for version in (1, 2, 3):
        home.store.write_json(path(version, "metrics.json"), {"after": {}})
    for version in (1, 2):
        home.promote(version, expected=version - 1, by="refresh")
    return home


def last(home: Home, version: int, **evaluate: str) -> str | None:
    given = {"model": "m", "facts": "f", "templates": "t", "home": home.store.url, "hparams": "h"}
    config = RefreshConfig.model_validate({**given, "facts": ("f",), "evaluate": evaluate})
    return job_of(config, home, version).evaluate.last


def test_a_night_is_compared_with_the_version_in_use(home: Home) -> None:
    assert last(home, 4) == home.store.join(path(2))
    home.promote(1, expected=2, by="rollback")
    assert last(home, 4) == home.store.join(path(1))


def test_a_run_that_is_named_goes_first(home: Home) -> None:
    assert last(home, 4, last="runs/best") == "runs/best"


def test_there_may_be_nothing_to_compare_with(home: Home, tmp_path: Path) -> None:
    assert last(Home(str(tmp_path / "new")), 1) is None
    # It is taken up again after it was put to use.
    assert last(home, 2) is None
    # A version without any fact was not measured.
    home.store.delete(path(2, "metrics.json"))
    assert last(home, 4) is None
