"""Jobs that compute in the process that runs them: no Ray, no DeepSpeed, the same behaviour.

That their targets and weights are those of a run on Ray is tested in `tests.e2e.test_run`; what
happens to a request that cannot be computed, in `tests.e2e.test_no_target`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline.errors import JobError, WorkerError
from pipeline.job.config import JobConfig
from pipeline.run import run_job
from pipeline.stages import update
from pipeline.zero.rank import UpdateRank
from tests.conftest import GOLDEN
from tests.e2e.conftest import HERE, job
from tests.e2e.test_refresh import place

FEW = 6
COMMANDS = """
import json, sys
from typer.testing import CliRunner
import torch
from jobs.cli import app

torch.set_num_threads(2)
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (command, result.output, result.exception)
found = [name for name in ("ray", "deepspeed", "lm_eval", "datasets") if name in sys.modules]
print(json.dumps({"imported": found, "threads": torch.get_num_threads()}))
"""


@pytest.fixture
def few(inputs: Path, tmp_path: Path) -> JobConfig:
    """A job in this process: six facts, a faulty row, and second moments that are there."""
    # The faulty rows come after ten good ones.
    table = pq.read_table(inputs / "requests.parquet")
    pq.write_table(table.slice(10 - FEW, FEW + 1), tmp_path / "few.parquet")
    values = {
        "requests": (str(tmp_path / "few.parquet"),),
        "corpus": None,
        "second_moments": str(GOLDEN / "gpt2" / "second_moments.safetensors"),
    }
    return job(inputs, str(tmp_path / "out"), **values | HERE)


def run_json(config: JobConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "run.json").read_text())


def test_no_command_imports_ray_or_deepspeed(inputs: Path, tmp_path: Path) -> None:
    table = pq.read_table(inputs / "requests.parquet")
    pq.write_table(table.slice(0, 12), tmp_path / "few.parquet")
    golden = GOLDEN / "gpt2"
    values = {
        "model": str(golden / "model"),
        "requests": str(tmp_path / "few.parquet"),
        "output": str(tmp_path / "out"),
        "hparams": str(golden / "hparams.json"),
        "second_moments": str(tmp_path / "moments"),
        "corpus": str(inputs / "corpus.parquet"),
        **HERE,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    corpus = str(inputs / "corpus.parquet")
    statistics = ["statistics", values["model"], corpus, "--output", values["second_moments"]]
    commands = [
        [*statistics, "--hparams", values["hparams"], "--workers", "0"],
        ["run", str(tmp_path / "job.yaml"), "--dry-run", "--no-estimate"],
        ["run", str(tmp_path / "job.yaml")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"imported": [], "threads": 2}
    status = json.loads((tmp_path / "out" / "run.json").read_text())
    # The templates are written by the model, the second moments are there.
    names = ["templates", "targets", "measure before", "update", "publish", "measure after"]
    assert (status["status"], [stage["name"] for stage in status["stages"]]) == ("complete", names)
    assert status["counts"] == {"requested": 12, "rejected": 2, "edited": 10}


def test_a_refresh_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(tmp_path)
    settings = yaml.safe_load(found.file().read_text())
    found.file().write_text(yaml.safe_dump(settings | HERE))
    monkeypatch.setitem(sys.modules, "pipeline.workers.ray_executor", None)
    assert found.tonight().version == 1
    assert found.weights(1) != (GOLDEN / "gpt2" / "model" / "model.safetensors").read_bytes()


def test_a_failed_update_is_tried_again_and_the_run_resumes(
    few: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(3))

    class Failing(UpdateRank):
        def edit_layer(self, index: int, *held: Any) -> Any:
            assert torch.get_num_threads() == 1
            if index == 1 and next(failures, None) is not None:
                raise RuntimeError("the solve was interrupted")
            return super().edit_layer(index, *held)

    monkeypatch.setattr(update, "UpdateRank", Failing)
    torch.set_num_threads(2)
    try:
        with pytest.raises(WorkerError, match=r"failed 3 times.*the solve was interrupted"):
            run_job(few)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert run_json(few)["status"] == "failed"
    result = run_job(few)
    status = run_json(few)
    found = {stage["name"]: stage["detail"] for stage in status["stages"]}
    assert list(found) == ["targets", "update", "publish", "measure after"]
    assert (found["targets"]["reused"], found["targets"]["finished"]) == (1, 0)
    assert found["update"] == {"ranks": 1, "reused": 1}
    assert (status["status"], result.metrics["counts"]["edited"]) == ("complete", FEW)


def test_a_cluster_that_would_not_be_used_is_refused(few: JobConfig) -> None:
    with pytest.raises(JobError, match=r"cluster head:6379 would not be used: .* this process"):
        run_job(few, address="head:6379")
    assert not Path(few.output).exists()
