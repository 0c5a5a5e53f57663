"""What a running job has to see to by itself, and what it leaves behind where it cannot."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import stages
from pipeline.errors import StorageError
from pipeline.folder import RunFolder
from pipeline.rank_group import Rendezvous
from pipeline.run import RunResult, run_job
from pipeline.update import UpdateJob, UpdateRank
from tests.e2e.conftest import Runner, job
from tests.e2e.test_run import folder, record_is_whole, run_json, weights


class Mortal(UpdateRank):
    """A rank that is killed once, in the middle of a layer: it has solved, and begins to write."""

    def __init__(self, meeting: Rendezvous, job: UpdateJob) -> None:
        super().__init__(meeting, job)
        self._journal = Path(str(job.run.local_path("journal")))

    def edit_layer(self, index: int) -> Any:
        if self._rank == 0:
            with self._journal.open("a") as journal:
                journal.write(f"edit {index}\n")
        self._index = index
        return super().edit_layer(index)

    def redo_layer(self, index: int, file: str) -> None:
        if self._rank == 0:
            with self._journal.open("a") as journal:
                journal.write(f"redo {index}\n")
        super().redo_layer(index, file)

    def _change(self, *args: Any) -> Any:
        marker = self._journal.with_name("killed")
        if self._rank == 1 and self._index == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._change(*args)


def copied(result: RunResult, output: Path, *without: str) -> Path:
    """A finished run as if some of its work had not been done yet."""
    shutil.copytree(folder(result), output)
    for name in without:
        (output / "records" / f"{name}.json").unlink()
    return output


def test_a_rank_that_is_killed_in_a_layer_costs_that_layer_only(
    run: Runner, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    output = copied(first, tmp_path / "out", "layer-1", "layer-2")
    monkeypatch.setattr(stages, "UpdateRank", Mortal)
    again = run_job(job(inputs, str(output)))
    assert (output / "killed").exists()
    assert (output / "journal").read_text().splitlines() == [
        *("redo 0", "edit 1", "edit 2"),
        *("redo 0", "redo 1", "edit 2"),
    ]
    (event,) = [e for e in run_json(again)["events"] if e["kind"] == "retry"]
    assert event["text"].startswith("update group, attempt 1: rank 1 of 2 failed in edit_layer: ")
    assert "as after signal 9 (SIGKILL)" in event["text"]
    expected = weights(first)
    for name, weight in weights(again).items():
        apart = torch.linalg.norm(weight - expected[name])
        assert apart <= 1e-6 * torch.linalg.norm(expected[name]), name
    assert all(record_is_whole(again, name) for name in again.folder.glob("records/*.json"))
    named = {report["file"] for report in run_json(again)["layers"]}
    assert set(again.folder.list("delta", unfinished=True)) == named


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    run: Runner, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    output = copied(first, tmp_path / "out", "published", "measured-after")
    shutil.rmtree(output / "model")
    room = (folder(first) / "model" / "model.safetensors").stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = r"^cannot write .*/model/model\.safetensors \(.*\); make room there, then run the same"
    # The kernel refuses files larger than a limit as it refuses what a disk has no room for.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(StorageError, match=said):
            run_job(job(inputs, str(output)))
        assert run_json_of(output)["status"] == "failed"
        with monkeypatch.context() as patched:
            # Not even the status can be written.
            patched.setattr(RunFolder, "finish", full)
            with pytest.raises(StorageError, match=said):
                run_job(job(inputs, str(output)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((output / "model").glob("*.safetensors"))
    assert not list((output / "model").glob(".*"))
    assert not (output / "model" / "config.json").exists()
    assert not (output / "records" / "published.json").exists()
    again = run_job(job(inputs, str(output)))
    assert again.status == "complete"
    assert all(torch.equal(weights(first)[name], w) for name, w in weights(again).items())


def full(*_: Any) -> None:
    raise StorageError("cannot write run.json")


def run_json_of(output: Path) -> dict[str, Any]:
    return dict(RunFolder(str(output)).store.read_json("run.json"))
