"""When processes start: ranks early if there is room, and after the workers if not."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.job.config import TargetsConfig, UpdateConfig
from pipeline.plan import Plan
from pipeline.workers import ray_executor as module
from pipeline.workers import sizes
from pipeline.workers.ray_executor import RayExecutor

JOB = ("the job",)


class Pool:
    """A fake pool of workers."""

    def __init__(
        self, factory: type, *, count: int, grown: Any, on_event: Any, **options: Any
    ) -> None:
        self.count, self.grown = count, grown
        self.absent, self.tell, self.open = count, on_event, True

    def close(self) -> None:
        self.open = False


class Ranks:
    """A fake group of ranks."""

    def __init__(self, factory: type, *, init_args: Any, wait: bool, **options: Any) -> None:
        self.init_args, self.waited, self.open = init_args, wait, True

    def close(self) -> None:
        self.open = False


class Site:
    """Makes an executor of two workers and two ranks on a cluster with some free CPUs."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        gpus_per_rank: float = 0,
        targets: TargetsConfig = TargetsConfig(workers=2),  # noqa: B008 - immutable
        own: bool = True,
    ) -> None:
        self.free, self.room, self.own = 4.0, 2, own
        self.made: list[Ranks] = []
        self.may_leave, self.left = Event(), False
        self.may_leave.set()
        monkeypatch.setattr(module, "WorkerPool", Pool)
        monkeypatch.setattr(module, "RankGroup", self._make)
        monkeypatch.setattr(module, "cpus_free", lambda: self.free)
        monkeypatch.setattr(module, "ray_session", self._session)
        for name in ("default_workers", "room_for_workers"):
            monkeypatch.setattr(module, name, lambda gpus, cpus_per_worker: self.room)
        job = SimpleNamespace(
            targets=targets,
            update=UpdateConfig(ranks=2, gpus_per_rank=gpus_per_rank),
        )
        plan = SimpleNamespace(job=job, target_shards=[1, 2, 3], base="base")
        self.executor = RayExecutor(cast(Plan, plan), None, lambda kind, text, **_: None)

    def _make(self, *args: Any, **options: Any) -> Ranks:
        self.made.append(Ranks(*args, **options))
        return self.made[-1]

    @contextmanager
    def _session(self, *args: Any, **options: Any) -> Iterator[None]:
        yield self.own
        self.may_leave.wait(20)
        self.left = True

    @property
    def pool(self) -> Any:
        return self.executor._started_pool()

    def expect(self) -> None:
        self.executor.expect_ranks(Ranks, JOB)

    def take(self) -> Any:
        return self.executor.take_ranks(Ranks, JOB)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(monkeypatch)


@pytest.mark.parametrize(
    ("own", "targets"), [(False, TargetsConfig()), (True, TargetsConfig(gpus_per_worker=0.5))]
)
def test_auto_takes_what_the_cluster_has_now_and_later(
    own: bool, targets: TargetsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(monkeypatch, targets=targets, own=own)
    assert site.pool.count == 2
    site.room = 9
    # There are three shards.
    assert site.pool.grown() == 3


def test_a_number_that_is_named_and_a_cluster_of_ones_own_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes.os, "cpu_count", lambda: 1)
    for site in (Site(monkeypatch, own=False), Site(monkeypatch, targets=TargetsConfig())):
        assert site.pool.grown is None


def test_expected_ranks_start_at_once_and_are_the_ones_taken(site: Site) -> None:
    with site.executor:
        site.expect()
        # Their CPUs are in use now.
        site.free = 2.0
        site.expect()
        pool, first = site.pool, site.take()
        assert not first.waited
        assert pool.open
        site.free = 4.0
        second = site.take()
    assert second is not first
    assert second.waited
    assert (first.open, second.open) == (True, True), "whoever takes ranks closes them"
    assert not pool.open


def test_workers_that_have_not_come_have_the_first_right_to_a_cpu(site: Site) -> None:
    site.free = 3.0
    site.expect()
    assert site.take().waited
    site.pool.absent = 1
    site.expect()
    assert not site.take().waited


def test_ranks_on_gpus_wait_until_the_workers_have_left_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = Site(monkeypatch, gpus_per_rank=1)
    pool = site.pool
    site.expect()
    assert pool.open
    assert site.take().waited
    assert not pool.open


def test_a_lost_worker_gets_the_place_of_ranks_that_only_wait(site: Site) -> None:
    site.expect()
    site.pool.tell("retry", "an error that its process survives")
    assert site.made[0].open
    site.pool.tell("death", "worker 1 was lost")
    assert not site.made[0].open
    assert site.take() is site.made[1]


@pytest.mark.parametrize(
    ("address", "facts", "here"),
    [(None, 100, True), (None, 100_000, False), ("auto", 100, False)],
)
def test_a_small_update_on_this_machine_is_done_by_this_process(
    address: str | None, facts: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(monkeypatch)
    monkeypatch.setattr(module, "SerialRank", lambda *given: ("here", *given))
    plan: Any = SimpleNamespace(
        job=SimpleNamespace(targets=TargetsConfig(workers=2), update=UpdateConfig()),
        target_shards=[1],
        base="base",
        checkpoint=SimpleNamespace(tensors={"a": SimpleNamespace(size=100 << 20)}),
        table=SimpleNamespace(requests=range(facts)),
    )
    site.executor = RayExecutor(plan, address, lambda kind, text, **_: None)
    site.expect()
    assert len(site.made) == (0 if here else 1)
    assert (site.take() == ("here", Ranks, JOB, 1)) is here


def test_unused_ranks_end_with_the_executor(site: Site) -> None:
    with site.executor:
        site.expect()
    assert not site.made[0].open


def test_a_dismissed_executor_leaves_while_others_go_on(site: Site) -> None:
    site.may_leave.clear()
    with site.executor:
        pool = site.pool
        site.expect()
        site.executor.dismiss()
        assert not site.left
        site.may_leave.set()
    assert site.left
    assert not pool.open
    assert not site.made[0].open
