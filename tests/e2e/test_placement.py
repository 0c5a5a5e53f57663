"""GPUs of several kinds on several nodes: which worker gets which, and how much work each does.

The GPUs are Ray's logical ones; a process sees of them what it would see of real ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from pipeline.cluster.session import ray_session, room_for_workers
from pipeline.cluster.tasks import Task
from pipeline.cluster.worker_pool import WorkerPool
from pipeline.errors import NoRoomError
from pipeline.progress import LineProgress
from pipeline.run import run_job
from pipeline.storage.store import Store
from tests.conftest import ROOT
from tests.e2e.conftest import job, wait_until

# Otherwise workers would import this module, and torch with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

until = partial(wait_until, within_s=120, every_s=0.1)


class Sight(NamedTuple):
    """A worker that reports its placement."""

    process: int
    node: str
    kind: str
    gpus: tuple[str, ...]


class Worker:
    """Works as fast as the kind of its GPU."""

    def look(self, seconds: dict[str, float]) -> Sight:
        kind = os.environ["KIND"]
        time.sleep(seconds[kind])
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        node = ray.get_runtime_context().get_node_id()
        return Sight(os.getpid(), node, kind, tuple(filter(None, gpus.split(","))))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that computes nothing, a node with two fast GPUs and one with a slow one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        add(cluster, "fast", gpus=2)
        add(cluster, "slow", gpus=1)
        with ray_session(cluster.address):
            yield cluster
        cluster.shutdown()


def add(cluster: Cluster, kind: str, *, gpus: int) -> Any:
    """Start a node whose processes know the kind of its GPUs."""
    return cluster.add_node(num_cpus=8, num_gpus=gpus, env_vars={"KIND": kind})


@pytest.fixture
def seen(cluster: Cluster) -> Callable[..., list[Sight]]:
    """Runs tasks on workers and reports which worker did each."""

    def run(tasks: int, *, slow: float = 0.1, **options: Any) -> list[Sight]:
        found: list[Sight] = []
        seconds = {"fast": 0.1, "slow": slow}
        with WorkerPool(Worker, **options) as pool:
            # All workers are ready before the work is distributed.
            until(lambda: pool.run("look", todo(8), lambda *_: None) == [] and not pool.absent)
            pool.run("look", todo(tasks, seconds), lambda _, sight: found.append(sight))
        return found

    return run


def todo(count: int, seconds: dict[str, float] | None = None) -> list[Task]:
    nothing = {"fast": 0.01, "slow": 0.01}
    return [Task(f"task {i}", (seconds or nothing,)) for i in range(count)]


def test_every_gpu_works_as_fast_as_it_can(seen: Callable[..., list[Sight]]) -> None:
    found = seen(24, slow=0.8, count=3, num_gpus=1)
    gpus = {(sight.kind, sight.gpus) for sight in found}
    assert gpus == {("fast", ("0",)), ("fast", ("1",)), ("slow", ("0",))}
    done = Counter(sight.process for sight in found)
    slow = next(sight.process for sight in found if sight.kind == "slow")
    assert all(count > 2 * done[slow] for process, count in done.items() if process != slow)


def test_several_workers_share_a_gpu(seen: Callable[..., list[Sight]]) -> None:
    found = seen(24, count=room_for_workers(0.5), num_gpus=0.5)
    processes = defaultdict(set)
    for sight in found:
        processes[sight.node, sight.gpus].add(sight.process)
    assert [len(each) for each in processes.values()] == [2, 2, 2]
    assert all(len(gpus) == 1 for _, gpus in processes)


def test_a_worker_with_several_gpus_has_them_on_one_node(seen: Callable[..., list[Sight]]) -> None:
    assert room_for_workers(2) == 1
    found = seen(4, count=1, num_gpus=2)
    assert {(sight.kind, frozenset(sight.gpus)) for sight in found} == {("fast", frozenset("01"))}


def test_ranks_that_the_nodes_cannot_hold_are_reported_before_targets_are_computed(
    cluster: Cluster, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.nodes.START_TIMEOUT_S", 1.5)
    lines: list[str] = []
    sections = {"targets": {"workers": 1}, "update": {"ranks": 4, "gpus_per_rank": 1}}
    with pytest.raises(
        NoRoomError, match=r"no nodes came within 1\.5 s: .* lower update\.ranks or"
    ):
        run_job(job(inputs, str(tmp_path / "out"), **sections), progress=LineProgress(lines.append))
    (said,) = [line for line in lines if "event=waiting" in line]
    assert "waiting for nodes, 1.5 s at most: 4 ranks of 1 CPU and 1 GPU each cannot be" in said
    assert "the cluster, which has 16 CPU and 3 GPU in all" in said
    run = Store(tmp_path / "out").read_json("run.json")
    assert (run["status"], run["stages"]) == ("failed", [])


def test_a_node_that_joins_late_is_used_and_one_that_leaves_is_survived(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.worker_pool._LOOK_S", 0.2)
    events: list[str] = []
    pool = WorkerPool(
        Worker,
        count=room_for_workers(1),
        grown=lambda: room_for_workers(1),
        num_gpus=1,
        on_event=lambda kind, _, **__: events.append(kind),
    )
    with pool:
        pool.run("look", todo(3), lambda *_: None)
        late = add(cluster, "fast", gpus=2)
        assert late.node_id in {s.node for s in work_until(pool, lambda: len(pool._seats) == 5)}
        cluster.remove_node(late, allow_graceful=False)
        work_until(pool, lambda: events.count("death") == 2, all_there=False)
        left: list[Sight] = []
        assert pool.run("look", todo(30), lambda _, sight: left.append(sight)) == []
        assert len(left) == 30
        assert late.node_id not in {sight.node for sight in left}


def work_until(
    pool: WorkerPool, what: Callable[[], bool], *, all_there: bool = True
) -> list[Sight]:
    """Let a pool work until a condition holds, and then a little longer."""
    found: list[Sight] = []

    def more() -> bool:
        assert pool.run("look", todo(8), lambda _, sight: found.append(sight)) == []
        return what() and not (all_there and pool.absent)

    until(more)
    assert pool.run("look", todo(40), lambda _, sight: found.append(sight)) == []
    return found
