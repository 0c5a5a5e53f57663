"""Caches of several users on one machine, with or without a HOME."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.models.fetching import localized
from pipeline.models.node_cache import default_cache, model_on_node
from pipeline.storage.user_folders import (
    CACHE_VARIABLE,
    cache_folder,
    can_write,
    hub_cache,
    libraries_environment,
    make_cache,
)
from pmet.errors import InputError
from tests.conftest import GOLDEN

OWN = f"pmet-{os.getuid()}"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder for the machine, and no cache set in the environment."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def no_access(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder look read-only; root may write anywhere, so the check is replaced."""
    access = os.access

    def refuse(path: str | Path, mode: int) -> bool:
        return not Path(path).is_relative_to(folder) and access(path, mode)

    monkeypatch.setattr("os.access", refuse)


def test_the_environment_names_the_cache(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_cache() == temporary / OWN / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == temporary / OWN
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pmet"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.setenv(CACHE_VARIABLE, "named")
    with pytest.raises(InputError, match=r"PMET_CACHE: 'named' is relative.*give an absolute path"):
        cache_folder()


def test_a_cache_that_cannot_be_written_is_passed_over_or_named(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_access(tmp_path / "xdg", monkeypatch)
    (tmp_path / "xdg").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == temporary / OWN
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"the cache .*/file/models cannot be written to \("):
        make_cache(tmp_path / "file" / "models")


def test_the_folder_in_the_temporary_one_is_closed_to_others(temporary: Path) -> None:
    make_cache(default_cache())
    assert (temporary / OWN).stat().st_mode & 0o777 == 0o700
    make_cache(default_cache())


@pytest.mark.parametrize("fault", ["another's", "open", "link", "file"])
def test_a_folder_that_others_may_have_prepared_is_refused(
    fault: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = temporary / OWN
    match fault:
        case "another's":
            other = os.getuid() + 1
            own = temporary / f"pmet-{other}"
            own.mkdir(mode=0o700)
            monkeypatch.setattr("os.getuid", lambda: other)
        case "open":
            own.mkdir()
            own.chmod(0o777)
        case "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            own.symlink_to(tmp_path / "elsewhere")
        case "file":
            own.touch()
    said = {
        "another's": r"belongs to user \d+, not to you \(user \d+\)",
        "open": r"is open to other users \(mode 0777, not 0700\)",
    }.get(fault, "is not a folder")
    model = GOLDEN / "gpt2" / "model"
    for fetch in (
        lambda: model_on_node(f"zip://::{model}/model.zip", None),
        lambda: localized("memory://models/base", default_cache()),
    ):
        monkeypatch.setattr("pipeline.models.fetching.attempt", lambda *_: {"config.json": {}})
        with pytest.raises(StorageError, match=rf"{own} {said}.*remove it, or set PMET_CACHE"):
            fetch()
    assert not list(tmp_path.glob("elsewhere/*"))


def test_a_shared_cache_of_another_user_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "x.lock")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "shared"))
    monkeypatch.setattr("pipeline.models.node_cache.FileLock.acquire", refuse)
    with pytest.raises(
        StorageError,
        match=r"the cache .*/shared/models cannot be written to \(Permission denied\); set PMET_",
    ):
        model_on_node("s3://models/base", None)


def test_libraries_leave_a_home_alone_that_cannot_be_written(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    assert libraries_environment() == {}
    assert not (temporary / OWN).exists()
    no_access(home, monkeypatch)
    monkeypatch.setenv("TRITON_HOME", "/mine")
    found = libraries_environment()
    assert found["MPLCONFIGDIR"] == str(temporary / OWN / "matplotlib")
    # Existing settings stay, and tokens and models in HOME can still be read.
    assert not found.keys() & {"TRITON_HOME", "HF_HOME", "HOME", "XDG_CACHE_HOME"}
    assert (temporary / OWN).is_dir()


def test_no_home_at_all(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user id without a name
    assert libraries_environment()["MPLCONFIGDIR"].startswith(str(temporary))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert hub_cache() == temporary / OWN / "hub"


def test_the_hubs_own_cache_is_used_where_it_can_be_written(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    assert hub_cache() is None
    no_access(tmp_path, monkeypatch)
    assert hub_cache() == temporary / OWN / "hub"
    assert not can_write(tmp_path / "hf")
