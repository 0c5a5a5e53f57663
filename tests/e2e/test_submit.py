"""A job on a cluster of three machines: submitted, followed, stopped, submitted again, finished."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from jobs import cli, submit_cli
from jobs.cli import main
from jobs.submit.server import JobServer
from pipeline.job.config import load_job
from pipeline.run import run_job
from pipeline.storage.store import Store
from tests.conftest import GOLDEN, RAY_JOB, ROOT
from tests.e2e.conftest import (
    assert_same_targets,
    assert_same_weights,
    targets_by_row,
    wait_until,
    worker_of,
)
from tests.e2e.test_run import weights
from tests.jobs.conftest import process_restored

PATIENCE_S = 240

until = partial(wait_until, within_s=PATIENCE_S, every_s=0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with its job server and two other nodes, each with one logical CPU."""
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # Ray waits half a minute before it considers a machine lost. One with little processor time
        # is silent for a few seconds.
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "12")
        # A worker that computes is found among the children of its node.
        patch.delenv(RAY_JOB, raising=False)
        # Nodes use this checkout, whatever else is installed.
        patch.setenv("PYTHONPATH", str(ROOT))
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


Pmet = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def pmet(cluster: Cluster) -> Iterator[Pmet]:
    """Run ``pmet`` as a user of this cluster would, but in this process, which starts sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://{cluster.head_node.webui_url}")
        patch.setenv("PMET_PYTHON", sys.executable)
        patch.setenv("COLUMNS", "200")
        for console in (cli.out, cli.err, submit_cli.out, submit_cli.err):
            patch.setattr(console, "width", 200)

        def invoke(*arguments: object) -> subprocess.CompletedProcess[str]:
            words, out, err = ["pmet", *map(str, arguments)], io.StringIO(), io.StringIO()
            patch.setattr(sys, "argv", words)
            with redirect_stdout(out), redirect_stderr(err), process_restored():
                try:
                    main()
                except SystemExit as ended:
                    status = int(ended.code or 0)
            return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())

        yield invoke


@pytest.fixture(scope="module")
def folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``job.yaml``, whose run folder is ``out`` beside it."""
    folder = tmp_path_factory.mktemp("submitted") / "überall 'x'"
    folder.mkdir()
    golden = GOLDEN / "gpt2"
    values = {
        "model": str(golden / "model"),
        "requests": str(inputs / "requests.parquet"),
        "output": str(folder / "out"),
        "hparams": str(golden / "hparams.json"),
        "second_moments": str(golden / "second_moments.safetensors"),
        "context_templates": str(golden / "context_templates.json"),
        "evaluate": {"sample": 4},
        "targets": {"workers": 3, "shard_size": 4},
        "update": {"ranks": 2},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return folder


def run_json(folder: Path) -> dict[str, Any]:
    path = folder / "out" / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def name_in(text: str) -> str:
    return next(word for word in text.split() if word.startswith("pmet-out-"))


@pytest.fixture(scope="module")
def stopped(cluster: Cluster, pmet: Pmet, folder: Path) -> dict[str, Any]:
    """The output while a run lost a machine, was submitted again, and was stopped."""
    said: dict[str, Any] = {"submitted": pmet("submit", folder / "job.yaml")}
    assert said["submitted"].returncode == 0, said["submitted"].stderr
    node = sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0]
    raylet = node.all_processes["raylet"][0].process.pid
    records = folder / "out" / "records"
    until(lambda: list(records.glob("targets-*.json")) and worker_of(raylet))
    cluster.remove_node(node, allow_graceful=False)
    said["again"] = pmet("submit", folder / "job.yaml")
    said["other"] = pmet("submit", folder / "job.yaml", "--set", "targets.workers=2")
    said["running"] = pmet("status", name_in(said["submitted"].stdout), "--json")
    until(lambda: run_json(folder).get("stage") == "update")
    said["stop"] = pmet("stop", folder / "out")
    said["status"] = pmet("status", folder / "out")
    said["events"] = run_json(folder)["events"]
    return said


@pytest.fixture(scope="module")
def finished(stopped: dict[str, Any], pmet: Pmet, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same job, submitted again and followed to its end, by a separate process."""
    command = [sys.executable, "-m", "jobs", "submit", str(folder / "job.yaml"), "--follow"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_a_job_is_submitted_once_while_it_runs(stopped: dict[str, Any]) -> None:
    first = name_in(stopped["submitted"].stdout)
    assert first.endswith("-1")
    assert stopped["again"].returncode == 0
    assert f"{first} is already running" in stopped["again"].stdout
    assert stopped["other"].returncode == 2
    assert "with other settings" in stopped["other"].stderr


def test_a_run_that_is_stopped_says_so_and_gives_its_folder_back(
    stopped: dict[str, Any], folder: Path
) -> None:
    assert stopped["stop"].returncode == 0, stopped["stop"].stderr
    assert "STOPPED" in stopped["stop"].stdout
    assert "stopped, attempt 1" in stopped["status"].stdout
    assert [e for e in stopped["events"] if e["kind"] == "death"], stopped["events"]
    running = json.loads(stopped["running"].stdout)
    assert running["submission"]["status"] == "RUNNING"
    assert running["folder"]["state"] == "running"
    assert running["folder"]["submission"] == running["submission"]["name"]


def test_a_stopped_run_is_finished_by_submitting_it_again(
    finished: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path
) -> None:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert name_in(finished.stdout).endswith("-2")
    assert "SUCCEEDED, exit status 0" in finished.stdout
    assert "facts edited" in finished.stdout, "what the run prints is shown"
    run = run_json(folder)
    assert (run["attempt"], run["status"], run["exit_status"]) == (2, "complete", 0)
    reused = {s["name"]: s["detail"].get("reused") for s in run["stages"]}
    assert reused["targets"] == 10
    # The same job, run by this process.
    settings = [f"output={tmp_path / 'here'}", "targets.workers=0", "update.ranks=0"]
    here = run_job(load_job(folder / "job.yaml", settings))
    there = Store(folder / "out")
    assert_same_targets(targets_by_row(here.folder), targets_by_row(there))
    submitted = type(here)("complete", there, there.read_json("metrics.json"))
    assert_same_weights(weights(here), weights(submitted))
    assert here.metrics["counts"] == submitted.metrics["counts"]


def test_exit_statuses_of_the_run_are_those_of_submit(
    finished: subprocess.CompletedProcess[str], pmet: Pmet, folder: Path, cluster: Cluster
) -> None:
    gates = ["--set", "gates.generalization_strict=1.0", "--set", "gates.score=1.0"]
    held = pmet("submit", folder / "job.yaml", "--wait", *gates)
    assert held.returncode == 3, held.stdout + held.stderr
    name = name_in(held.stdout)
    assert name.endswith("-3")
    shown = pmet("status", name).stdout
    assert "exit status" in shown
    assert "held, attempt 3" in shown
    nothing = ["--set", f"requests={folder}/none.parquet", "--set", f"output={folder}/out-none"]
    bad = pmet("submit", folder / "job.yaml", "--wait", *nothing)
    assert bad.returncode == 2
    assert "none.parquet matches no file" in bad.stderr
    listed = pmet("list").stdout
    assert [line.split()[1:3] for line in listed.splitlines()[1:5]] == [
        ["FAILED", "2"],
        ["FAILED", "3"],
        ["SUCCEEDED", "0"],
        ["STOPPED", "1"],
    ]
    assert "held back: " in pmet("logs", name).stdout


def test_what_anybody_may_read_holds_no_secret(
    finished: subprocess.CompletedProcess[str], cluster: Cluster, pmet: Pmet, folder: Path
) -> None:
    secret = f"output=memory://user:hush@{folder.name}/out"
    refused = pmet("submit", folder / "job.yaml", "--set", secret)
    assert refused.returncode == 2
    jobs = JobServer.at(f"http://{cluster.head_node.webui_url}").jobs()
    ours = [job for job in jobs if job.submission_id]
    assert len(ours) == 4
    for job in ours:
        said = f"{job.entrypoint} {job.metadata} {job.runtime_env}"
        assert "requests.parquet" not in said, "the job file travels as a file"
        assert job.metadata["pmet_output"].startswith("/")
