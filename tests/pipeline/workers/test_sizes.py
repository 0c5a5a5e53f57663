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


def test_a_job_in_this_process_has_one_of_each() -> None:
    targets = TargetsConfig(workers=0, threads_per_worker=3)
    job = SimpleNamespace(targets=targets, update=UpdateConfig(ranks=0))
    assert sizes.local_sizes(cast(Plan, SimpleNamespace(job=job))) == (1, 1, 3)
