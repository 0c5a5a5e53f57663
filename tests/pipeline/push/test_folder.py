"""Pushes to folders on any storage: whole or not usable, and never over anything else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import FolderBusyError, JobError, OutputError, RunFolderError, StorageError
from pipeline.push import folder
from pipeline.push.pushing import push
from pipeline.storage.store import Store
from tests.pipeline.push.test_hub import pushed_files
from tests.saved_edits import published_run


def arrived(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.read_bytes(name) for name in store.list() if name != ".pmet_push.json"}


def test_a_model_arrives_whole_and_a_second_push_does_nothing(
    any_url: str, pushed_run: Path
) -> None:
    assert push(str(pushed_run), any_url).changed
    assert arrived(any_url) == pushed_files(pushed_run / "model")
    before = Store(any_url).modified(".pmet_push.json")
    assert not push(str(pushed_run), any_url).changed
    assert Store(any_url).modified(".pmet_push.json") == before


@pytest.mark.parametrize("kind", ["adapter", "delta"])
def test_an_export_arrives_whole(exports: dict[str, Path], kind: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert push(str(exports[kind]), out).changed
    assert arrived(out) == pushed_files(exports[kind])
    assert not push(str(exports[kind]), out).changed


def test_a_killed_push_opens_nowhere_and_the_next_one_starts_over(
    pushed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, done = folder.copy, []

    def killed(contents: Any, name: str, target: Store) -> None:
        if name == contents.last:
            raise KeyboardInterrupt
        copy(contents, name, target)
        done.append(name)

    monkeypatch.setattr(folder, "copy", killed)
    with pytest.raises(KeyboardInterrupt):
        push(str(pushed_run), str(tmp_path / "out"))
    assert "model.safetensors" in done
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(folder, "copy", copy)
    assert push(str(pushed_run), str(tmp_path / "out")).changed
    assert arrived(str(tmp_path / "out")) == pushed_files(pushed_run / "model")


def test_a_file_that_went_missing_is_not_taken_for_there(pushed_run: Path, tmp_path: Path) -> None:
    push(str(pushed_run), str(tmp_path / "out"))
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(OutputError, match="name a folder that is empty or does not exist"):
        push(str(pushed_run), str(tmp_path / "out"))


def test_a_folder_of_other_files_is_refused(
    pushed_run: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=rf"^{re.escape(str(out))} holds mine.txt; name a folder"):
        push(str(pushed_run), str(out))
    push(str(exports["delta"]), str(tmp_path / "delta"))
    before = arrived(str(tmp_path / "delta"))
    with pytest.raises(OutputError, match=r"holds \.pmet_push\.json, README\.md, export\.json"):
        push(str(pushed_run), str(tmp_path / "delta"))
    assert arrived(str(tmp_path / "delta")) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"is a file; name a folder$"):
        push(str(pushed_run), str(tmp_path / "file"))


def test_a_folder_that_overlaps_with_what_is_pushed_is_refused(pushed_run: Path) -> None:
    for inside in ("model", "model/copy", ".", "copy"):
        with pytest.raises(JobError, match=r"name another destination$"):
            push(str(pushed_run), str(pushed_run / inside))
    assert not (pushed_run / "copy").exists()


def test_of_two_commands_in_one_folder_the_later_goes_on(
    pushed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = folder.copy

    def taken(contents: Any, name: str, target: Store) -> None:
        monkeypatch.setattr(folder, "copy", copy)
        push(str(pushed_run), str(tmp_path / "out"))

    monkeypatch.setattr(folder, "copy", taken)
    with pytest.raises(FolderBusyError, match="another command has begun to write to"):
        push(str(pushed_run), str(tmp_path / "out"))
    assert arrived(str(tmp_path / "out")) == pushed_files(pushed_run / "model")


def test_a_damaged_file_does_not_arrive(tmp_path: Path) -> None:
    run = published_run(tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"model\.safetensors is damaged: its SHA-256 is not"):
        push(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_storage_that_does_not_exist_is_named(pushed_run: Path) -> None:
    with pytest.raises(StorageError, match="nosuch://bucket/out"):
        push(str(pushed_run), "nosuch://bucket/out")
