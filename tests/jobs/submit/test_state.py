"""The state of a run according to its folder, without a cluster."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

import pipeline.run_folder.folder
from jobs.submit.state import read_state
from pipeline.errors import StorageError
from pipeline.progress import CountedStage, Stage
from pipeline.run_folder.folder import RunFolder
from pipeline.run_folder.lease import Holder, Lease
from pipeline.storage.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "out"))
    folder.begin({}, seed=0)
    return folder


def test_a_folder_where_nothing_has_run(tmp_path: Path) -> None:
    assert read_state(str(tmp_path)) is None


def test_a_run_that_holds_its_folder_is_running(folder: RunFolder) -> None:
    with Lease.acquire(folder.store):
        state = read_state(folder.store.url)
        assert state is not None
        assert state.state == "running"
        assert state.silent_s is not None
    state = read_state(folder.store.url)
    assert state is not None
    assert state.state == "lost", "the lease was given back, and the status still says running"


def test_a_run_without_a_sign_of_life_is_lost(folder: RunFolder) -> None:
    elsewhere = replace(Holder.here(60), machine="another", renewed_at="2026-01-01T00:00:00+00:00")
    folder.store.write_json("lease/000001.json", asdict(replace(elsewhere, expires_s=-1.0)))
    state = read_state(folder.store.url)
    assert state is not None
    assert state.state == "lost"


@pytest.mark.parametrize(("status", "code"), [("complete", 0), ("held", 3), ("failed", 2)])
def test_an_ended_run_has_its_exit_status(folder: RunFolder, status: str, code: int) -> None:
    folder.finish(status, "why", exit_status=code)
    state = read_state(folder.store.url)
    assert state is not None
    assert (state.state, state.as_json()["exit_status"]) == (status, code)


def test_how_far_a_stage_is_can_be_read(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.run_folder.folder, "_PROGRESS_EVERY_S", 0.0)
    with folder.stage("targets", 100):
        bar = CountedStage(Stage(), 100, folder.progress)
        bar.skip(40)
        state = read_state(folder.store.url)
        assert state is not None
        assert state.seconds_left is None, "what was there before says nothing of the rate"
        bar.advance(20)
        state = read_state(folder.store.url)
        assert state is not None
        progress = state.run["progress"]
        assert (progress["done"], progress["total"]) == (60, 100)
        assert state.seconds_left == pytest.approx(40 / progress["rate"])


def test_progress_is_written_now_and_then_only(folder: RunFolder) -> None:
    with folder.stage("targets", 1000):
        before = folder.store.modified("run.json")
        bar = CountedStage(Stage(), 1000, folder.progress)
        for _ in range(1000):
            bar.advance()
        assert folder.store.modified("run.json") == before


def test_a_file_that_is_no_status_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).write_json("run.json", [1])
    with pytest.raises(
        StorageError, match="is not the status of a run; check that this is a run folder"
    ):
        read_state(str(tmp_path))
