"""``pmet submit`` and the related commands, as far as they need no cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
import yaml

from jobs import submit_cli
from pipeline.events import EventKind
from pipeline.run_folder.folder import RunFolder
from tests.jobs.conftest import Invoke


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for console in (submit_cli.out, submit_cli.err):
        monkeypatch.setattr(console, "width", 200)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    values = {
        "model": "EleutherAI/gpt-j-6b",
        "requests": "s3://facts/*.parquet",
        "output": "/nfs/runs/tonight",
        "hparams": "gpt-j-6b",
        "second_moments": "s3://stats",
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_dry_run_shows_what_would_travel(pmet: Invoke, job: Path) -> None:
    status, out, err = pmet("submit", job, "--dry-run", "--set", "seed=7", "--address", "http://x")
    assert status == 0
    assert "seed: 7" in out
    assert "pmet-tonight-" in out
    assert "-m jobs run job.yaml --address auto" in out
    assert "a disk that every node" in err
    assert "output: /nfs/runs/tonight" in err
    assert not ray.is_initialized()


def test_a_path_of_this_machine_is_bad_input(pmet: Invoke, job: Path) -> None:
    status, _, err = pmet("submit", job, "--set", "output=runs/tonight")
    assert status == 2
    assert "output: runs/tonight is relative, so it differs between machines" in err


def test_a_cluster_that_does_not_answer_is_an_error(pmet: Invoke, job: Path) -> None:
    status, _, err = pmet("submit", job, "--address", "http://127.0.0.1:1")
    assert status == 1
    assert "no job server answers at http://127.0.0.1:1" in err
    assert "Traceback" not in err


def test_the_folder_alone_shows_how_a_run_ended(pmet: Invoke, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "out"))
    folder.begin({}, seed=0)
    folder.event(EventKind.RETRY, "shard 3 [of 7]: it died")
    with folder.stage("targets", 4) as detail:
        detail |= {"shards": 2, "finished": 1}
    folder.finish("failed", "the storage is full", exit_status=1)
    status, out, err = pmet("status", tmp_path / "out")
    assert (status, err) == (0, "")
    for said in ("failed, attempt 1", "the storage is full", "exit status", "shard 3 [of 7]"):
        assert said in out
    # Even if the cluster that it ran on is gone.
    status, out, err = pmet("status", tmp_path / "out", "--address", "http://127.0.0.1:1", "--json")
    assert status == 0
    assert "no job server answers" in err
    assert json.loads(out)["folder"]["state"] == "failed"


def test_a_folder_without_a_run_is_bad_input(pmet: Invoke, tmp_path: Path) -> None:
    status, _, err = pmet("status", tmp_path)
    assert status == 2
    assert "holds no run" in err
