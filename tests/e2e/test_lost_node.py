"""A machine of the cluster is lost while it computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.config import JobConfig
from pipeline.run import run_job
from tests.conftest import GOLDEN
from tests.e2e.conftest import assert_same_targets, assert_same_weights, job, targets_by_row
from tests.e2e.test_run import run_json, weights


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with two logical CPUs, and another node with one."""
    # Ray waits half a minute until it believes that a machine is lost.
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster
    cluster.shutdown()


def small_job(inputs: Path, output: Path, *, workers: int, ranks: int) -> JobConfig:
    return job(
        inputs,
        str(output),
        corpus=None,
        second_moments=str(GOLDEN / "gpt2" / "second_moments.safetensors"),
        evaluate={"sample": 4},
        targets={"workers": workers, "shard_size": 4},
        update={"ranks": ranks},
    )


def worker_of(raylet: int) -> psutil.Process | None:
    """A process under a node's raylet that is computing targets just now."""
    for child in psutil.Process(raylet).children(recursive=True):
        if " ".join(child.cmdline()).startswith("ray::_WorkerProcess.call"):
            return child
    return None


@pytest.mark.slow
def test_a_run_goes_on_without_a_machine_that_is_lost(
    cluster: Cluster, inputs: Path, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    lost: list[float] = []

    def lose_when_it_computes() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            records = list((tmp_path / "out" / "records").glob("targets-*.json"))
            if records and worker_of(raylet):
                cluster.remove_node(node, allow_graceful=False)
                lost.append(time.monotonic())
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=lose_when_it_computes)
    watcher.start()
    disturbed = run_job(
        small_job(inputs, tmp_path / "out", workers=3, ranks=2), address=cluster.address
    )
    watcher.join()
    assert lost
    events = run_json(disturbed)["events"]
    assert [e for e in events if e["kind"] == "death" and "was lost" in e["text"]], events
    undisturbed = run_job(
        small_job(inputs, tmp_path / "other", workers=1, ranks=1), address=cluster.address
    )
    assert run_json(undisturbed)["events"] == []
    assert disturbed.metrics["counts"] == undisturbed.metrics["counts"]
    assert_same_targets(targets_by_row(undisturbed.folder), targets_by_row(disturbed.folder))
    assert_same_weights(weights(undisturbed), weights(disturbed))
