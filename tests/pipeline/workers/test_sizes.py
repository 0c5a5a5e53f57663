"""The numbers of workers and ranks of a job."""

from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.job.config import TargetsConfig, UpdateConfig
from pipeline.plan import Plan
from pipeline.workers import sizes


@pytest.mark.parametrize(
    ("mebibytes", "cores", "ranks"), [(5, 8, 1), (129, 8, 2), (600, 8, 4), (600, 2, 2)]
)
def test_a_model_gets_the_ranks_that_it_is_worth(
    mebibytes: int, cores: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = SimpleNamespace(targets=TargetsConfig(), update=UpdateConfig())
    halves = SimpleNamespace(size=mebibytes << 19)
    checkpoint = SimpleNamespace(tensors={"a": halves, "b": halves})
    monkeypatch.setattr(sizes.os, "cpu_count", lambda: cores)
    plan = SimpleNamespace(job=job, checkpoint=checkpoint)
    assert sizes.local_sizes(cast(Plan, plan))[1] == ranks


@pytest.mark.parametrize(
    ("mebibytes", "facts", "update", "soon"),
    [
        (512, 256, UpdateConfig(), True),
        (512, 257, UpdateConfig(), False),
        (5, 20_000, UpdateConfig(), True),
        (2100, 1, UpdateConfig(), False),
        (5, 1, UpdateConfig(ranks=1), False),
        (5, 1, UpdateConfig(gpus_per_rank=1), False),
    ],
)
def test_a_small_update_needs_no_rank_of_its_own(
    mebibytes: int, facts: int, update: UpdateConfig, soon: bool
) -> None:
    checkpoint = SimpleNamespace(tensors={"a": SimpleNamespace(size=mebibytes << 20)})
    table = SimpleNamespace(requests=range(facts))
    plan = SimpleNamespace(job=SimpleNamespace(update=update), checkpoint=checkpoint, table=table)
    assert sizes.updated_soon(cast(Plan, plan)) is soon


def test_a_job_in_this_process_has_one_of_each() -> None:
    targets = TargetsConfig(workers=0, threads_per_worker=3)
    job = SimpleNamespace(targets=targets, update=UpdateConfig(ranks=0))
    assert sizes.local_sizes(cast(Plan, SimpleNamespace(job=job))) == (1, 1, 3)
