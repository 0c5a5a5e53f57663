"""What is finished is not done again, and what is not whole does not count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.statistics import compute_statistics
from pipeline.corpus import TOKENS
from pipeline.errors import RunFolderError
from pipeline.progress import Progress
from pipeline.run import run_job
from pmet import Edit
from pmet.second_moment import MAX_TOKENS
from tests.conftest import GOLDEN
from tests.e2e.conftest import GOOD_ROWS, Runner, job, targets_by_row
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
        tokens=TOKENS,
        max_length=MAX_TOKENS,
        workers="3",
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
    shared = {"workers": 2, "store": str(tmp_path / "store")}
    first = run(targets=shared)
    again = run_job(job(inputs, str(tmp_path / "out"), targets=shared, update={"ranks": 1}))
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
    # As if the run had been lost between its second and third layer, with one shard missing.
    (tmp_path / "out" / "records" / "layer-2.json").unlink()
    (tmp_path / "out" / "records" / "published.json").unlink()
    (tmp_path / "out" / "records" / "targets-00001.json").unlink()
    stray = ["targets/00001-stray.parquet", "delta/stray.safetensors", "model/stray.safetensors"]
    for name in stray:
        (tmp_path / "out" / name).write_bytes(b"half of i")
    again = run_job(job(inputs, output))
    assert not any((tmp_path / "out" / name).exists() for name in stray)
    assert Edit.load(tmp_path / "out" / "delta").deltas.keys() == set(edited_names(again))
    assert all(record_is_whole(again, name) for name in again.folder.glob("records/*.json"))
    detail = {s["name"]: s["detail"] for s in run_json(again)["stages"]}
    assert detail["targets"]["shards"] == 1
    assert detail["targets"]["reused"] == 1
    assert detail["update"]["reused"] == 2
    assert "second moments" not in detail
    assert all(torch.equal(weights(again)[n], before[n]) for n in before)
    with pytest.raises(RunFolderError, match="job changed; name another output"):
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
