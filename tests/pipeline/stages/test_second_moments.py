"""Second moments that the update cannot use are refused before any target is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import JobError
from pipeline.progress import Progress, Stage
from pipeline.run import run_job
from tests.conftest import GOLDEN, load_golden
from tests.e2e.conftest import job, write_inputs

MOMENTS = "second_moments.safetensors"


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder with a corpus and a few requests."""
    write_inputs(tmp_path)
    table = pq.read_table(tmp_path / "requests.parquet").slice(0, 3)
    pq.write_table(table, tmp_path / "requests.parquet")
    return tmp_path


def stages(folder: Path) -> list[str]:
    return [stage["name"] for stage in json.loads((folder / "out/run.json").read_text())["stages"]]


def test_given_ones_without_a_factor_are_refused_before_targets(few: Path) -> None:
    moments = load_file(GOLDEN / "gpt2" / MOMENTS)
    name = sorted(moments)[1]
    values, vectors = torch.linalg.eigh(moments[name].double())
    values[:100] = 0
    moments[name] = (vectors @ values.diag() @ vectors.T).float()
    save_file(moments, few / "bad.safetensors")
    config = job(few, str(few / "out"), second_moments=str(few / "bad.safetensors"))
    with pytest.raises(JobError) as caught:
        run_job(config)
    assert f"second_moments: {name} of {few / 'bad.safetensors'} cannot be used" in str(
        caught.value
    )
    assert "targets" not in stages(few)


def test_the_update_reads_the_factor_that_was_checked(few: Path) -> None:
    folder = few / "moments"
    folder.mkdir()
    shutil.copy(GOLDEN / "gpt2" / MOMENTS, folder)
    config = job(few, str(few / "out"), second_moments=str(folder), corpus=None)
    kept: dict[str, float] = {}

    class Watched(Progress):
        """Notes which factors exist when targets begin."""

        @contextmanager
        def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
            if name == "targets":
                kept.update((f.name, f.stat().st_mtime_ns) for f in folder.glob("factors/*"))
            yield Stage()

    run_job(config, progress=Watched())
    assert len(kept) == len(load_golden("gpt2").hparams.layers)
    assert kept == {f.name: f.stat().st_mtime_ns for f in folder.glob("factors/*")}
    status = json.loads((few / "out/run.json").read_text())
    assert {layer["form"] for layer in status["layers"]} == {"requests"}
