"""After any fault, finished work is not repeated, and incomplete work does not count."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.statistics import compute_statistics
from pipeline.cluster.rank_group import Rendezvous
from pipeline.errors import RunFolderError, StorageError
from pipeline.progress import Progress
from pipeline.run import RunResult, run_job
from pipeline.run_folder.folder import RunFolder
from pipeline.stages import update
from pipeline.zero.layer_edit import LayerReport
from pipeline.zero.rank import UpdateJob, UpdateRank
from pmet import Edit
from pmet.update.second_moments import MAX_TOKENS
from tests.conftest import GOLDEN
from tests.e2e.conftest import GOOD_ROWS, Runner, assert_same_weights, job, targets_by_row
from tests.e2e.test_run import edited_names, folder, record_is_whole, run_json, weights


def test_a_job_keeps_what_pmet_statistics_computes(
    run: Runner, inputs: Path, tmp_path: Path
) -> None:
    compute_statistics(
        str(GOLDEN / "gpt2" / "model"),
        [str(inputs / "corpus.parquet")],
        output=str(tmp_path),
        hparams=str(GOLDEN / "gpt2" / "hparams.json"),
        layers=None,
        tokens="auto",
        max_length=MAX_TOKENS,
        workers="0",
        gpus_per_worker=0,
        address=None,
        progress=Progress(),
        console=Console(quiet=True),
    )
    result = run()
    kept = folder(result) / "second_moments"
    computed = list(tmp_path.iterdir())
    assert len(computed) == 2
    assert all((kept / f.name).read_bytes() == f.read_bytes() for f in computed)
    (stage,) = [s for s in run_json(result)["stages"] if s["name"] == "second moments"]
    provenance = json.loads((kept / "second_moments.json").read_text())
    assert stage["detail"]["convergence"] == provenance["convergence"]


def test_targets_of_an_earlier_run_are_not_computed_again(
    run: Runner, inputs: Path, tmp_path: Path
) -> None:
    shared = {
        "targets": {"workers": 0, "store": str(tmp_path / "store")},
        "second_moments": str(GOLDEN / "gpt2" / "second_moments.safetensors"),
        "corpus": None,
        "evaluate": {"sample": 4},
    }
    first = run(**shared)
    again = run_job(job(inputs, str(tmp_path / "out"), **shared))
    detail = {s["name"]: s["detail"] for s in run_json(again)["stages"]}
    assert (detail["targets"]["stored"], detail["targets"]["found"]) == (GOOD_ROWS, 0)
    one, two = targets_by_row(first.folder), targets_by_row(again.folder)
    assert all(np.array_equal(one[row].view(np.int32), two[row].view(np.int32)) for row in one)
    assert again.metrics["after"] == pytest.approx(first.metrics["after"])
    assert f"stored {GOOD_ROWS}" in (tmp_path / "out" / "report.html").read_text()


def test_the_same_job_resumes_and_another_is_refused(
    run: Runner, inputs: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    shutil.copytree(folder(run()), output)
    before = weights(run())
    # As if the run had died between its second and third layer, with one shard missing.
    (tmp_path / "out" / "records" / "layer-2.json").unlink()
    (tmp_path / "out" / "records" / "published.json").unlink()
    (tmp_path / "out" / "records" / "targets-00001.json").unlink()
    stray = [f"targets/00001-{'0' * 32}.parquet", f"delta/w-{'0' * 32}.safetensors"]
    mine = ["targets/notes.txt", "delta/notes.txt"]
    for name in (*stray, *mine):
        (tmp_path / "out" / name).write_bytes(b"half of i")
    again = run_job(job(inputs, output))
    assert not any((tmp_path / "out" / name).exists() for name in stray)
    assert all((tmp_path / "out" / name).exists() for name in mine)
    assert Edit.load(tmp_path / "out" / "delta").deltas.keys() == set(edited_names(again))
    assert all(record_is_whole(again, name) for name in again.folder.glob("records/*.json"))
    detail = {s["name"]: s["detail"] for s in run_json(again)["stages"]}
    assert detail["targets"]["shards"] == 1
    assert detail["targets"]["reused"] == 1
    assert detail["update"]["reused"] == 2
    assert "second moments" not in detail
    assert all(torch.equal(weights(again)[n], before[n]) for n in before)
    with pytest.raises(RunFolderError, match=r"job \(seed: 0 before, now 7\) changed"):
        run_job(job(inputs, output, seed=7))


def test_a_damaged_shard_does_not_count_as_finished(
    run: Runner, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder(run()), output)
    first = weights(run())
    record = json.loads((output / "records" / "targets-00000.json").read_text())
    shard = output / record["file"]
    shard.write_bytes(shard.read_bytes()[:-20])
    (output / "records" / "layer-0.json").unlink()
    model = output / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8] + bytes(8))
    again = run_job(job(inputs, str(output)))
    detail = {s["name"]: s["detail"] for s in run_json(again)["stages"]}
    assert detail["targets"]["shards"] == 1
    assert all(torch.equal(weights(again)[n], w) for n, w in first.items())


class Mortal(UpdateRank):
    """A rank that writes down what it does, and is killed once: between a solve and its writing."""

    fatal = (0, 2)
    """The turn, and the layer in it."""

    def __init__(self, meeting: Rendezvous, job: UpdateJob) -> None:
        super().__init__(meeting, job)
        self._journal = Path(str(job.run.local_path("journal")))

    def edit_layer(self, index: int, held: LayerReport | None = None) -> Any:
        self._write(f"edit {index}")
        self._step = (held.solves if held else 0, index)
        return super().edit_layer(index, held)

    def redo_layer(self, index: int, file: str) -> None:
        self._write(f"redo {index}")
        super().redo_layer(index, file)

    def _write(self, line: str) -> None:
        if self._rank == 0:
            with self._journal.open("a") as journal:
                journal.write(f"{line}\n")

    def _change(self, *args: Any) -> Any:
        marker = self._journal.with_name("killed")
        if self._rank == 1 and self._step == self.fatal and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._change(*args)


def copied(result: RunResult, output: Path, *without: str) -> Path:
    """Make a finished run look as if some of its work had not been done yet."""
    shutil.copytree(folder(result), output)
    for name in without:
        (output / "records" / f"{name}.json").unlink()
    return output


def test_a_rank_that_is_killed_in_a_layer_costs_that_layer_only(
    run: Runner,
    local_ray: None,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run()
    output = copied(first, tmp_path / "out", "layer-1", "layer-2")
    monkeypatch.setattr(update, "UpdateRank", Mortal)
    on_ray = {"targets": {"workers": 1}, "update": {"ranks": 2}}
    again = run_job(job(inputs, str(output), **on_ray))
    assert (output / "killed").exists()
    assert (output / "journal").read_text().splitlines() == [
        *("redo 0", "edit 1", "edit 2"),
        *("redo 0", "redo 1", "edit 2"),
    ]
    (event,) = [e for e in run_json(again)["events"] if e["kind"] == "retry"]
    assert event["attempt"] == 1
    assert "rank 1 of 2 failed in edit_layer: " in event["text"]
    assert "as after signal 9 (SIGKILL)" in event["text"]
    assert_same_weights(weights(first), weights(again))
    assert all(record_is_whole(again, name) for name in again.folder.glob("records/*.json"))
    named = {report["file"] for report in run_json(again)["layers"]}
    assert set(again.folder.list("delta", unfinished=True)) == named


def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_room(
    run: Runner, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    output = copied(first, tmp_path / "out", "published", "measured-after")
    shutil.rmtree(output / "model")
    room = (folder(first) / "model" / "model.safetensors").stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = r"^cannot write .*/model/model\.safetensors \(.*\); make room there, then run the same"
    # The kernel refuses files above a size limit just as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(StorageError, match=said):
            run_job(job(inputs, str(output)))
        assert run_json_of(output)["status"] == "failed"
        with monkeypatch.context() as patched:
            # Even the status cannot be written.
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


def full(*_: Any, **__: Any) -> None:
    raise StorageError("cannot write run.json")


def run_json_of(output: Path) -> dict[str, Any]:
    return dict(RunFolder(str(output)).store.read_json("run.json"))
