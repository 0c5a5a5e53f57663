"""The job of a refresh, and the allowed places of its home."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from jobs.refresh.config import RefreshConfig
from jobs.refresh.home import Home, path
from jobs.refresh.night import job_of, preview, refresh, refuse_overlaps
from pipeline.errors import JobError, RunFolderError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Two promoted versions, and a third that a gate held back."""
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
    # It is resumed after its promotion.
    assert last(home, 2) is None
    # A version without facts was not measured.
    home.store.delete(path(2, "metrics.json"))
    assert last(home, 4) is None


def config_of(tmp_path: Path, **changes: str) -> RefreshConfig:
    given = {
        "model": str(tmp_path / "base"),
        "facts": (str(tmp_path / "facts"),),
        "templates": str(tmp_path / "t.yaml"),
        "home": str(tmp_path / "home"),
        "hparams": "gpt-j-6b",
    }
    return RefreshConfig.model_validate({**given, **changes})


@pytest.mark.parametrize("begin", [refresh, preview])
def test_a_home_may_not_overlap_with_what_nights_read(begin: Any, tmp_path: Path) -> None:
    for changes, said in (
        ({"home": str(tmp_path / "base")}, r"model: .*/base is the home"),
        ({"home": str(tmp_path / "facts" / "home")}, r"facts: .*/facts holds the home"),
        ({"templates": str(tmp_path / "home" / "t.yaml")}, r"templates: .* lies inside the home"),
        ({"second_moments": str(tmp_path / "home" / "versions")}, r"second_moments: .* is the "),
    ):
        with pytest.raises(JobError, match=said):
            begin(config_of(tmp_path, **changes))
    (tmp_path / "base").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "versions").symlink_to(tmp_path / "base")
    with pytest.raises(JobError, match=r"model: .*/base is the home .*/home/versions"):
        begin(config_of(tmp_path))


@pytest.mark.parametrize("begin", [refresh, preview])
def test_a_folder_of_the_users_is_no_home(begin: Any, tmp_path: Path) -> None:
    (tmp_path / "home" / "versions").mkdir(parents=True)
    (tmp_path / "home" / "versions" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"home: .* holds versions and is not a home"):
        begin(config_of(tmp_path))
    assert [path.name for path in (tmp_path / "home").rglob("*")] == ["versions", "mine.txt"]


def test_what_nights_share_may_be_named_where_it_is_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    named = {"second_moments": f"{home}/second_moments", "context_templates": f"{home}/t.json"}
    refuse_overlaps(config_of(tmp_path, **named), date(2026, 11, 27))
