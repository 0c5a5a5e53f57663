"""A job's estimate follows from rates and from its shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, BloomConfig

import pipeline.estimate.prediction
import pipeline.models.checks
from pipeline.errors import JobError, WorkerError
from pipeline.estimate.calibration import Rates, Sample
from pipeline.estimate.prediction import estimate
from pipeline.plan import Plan, make_plan
from tests.conftest import GOLDEN
from tests.e2e.conftest import inputs, job, shared  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_ray")

RANKS = {"ranks": 2}
RATES = Rates(
    ready=4.0,
    ranks=0.0,
    templates=0.0,
    target=1.0,
    key=0.5,
    measured=0.1,
    known=0.0,
    moment=0.001,
    text=0.0,
    drawing=0.0,
    flop=0.0,
    peak_bytes=1e9,
)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The tasks given to the processes, none of which is started."""
    told: list[Sample] = []

    def calibrated(samples: list[Sample]) -> Rates:
        told[:] = samples
        return RATES

    monkeypatch.setattr(pipeline.estimate.prediction, "calibrate", calibrated)
    monkeypatch.setattr(pipeline.estimate.prediction.os, "cpu_count", lambda: 4)
    return told


def test_workers_share_shards_and_ranks_share_keys(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    samples: list[Sample],
) -> None:
    targets = {"workers": 3, "shard_size": 10}
    config = job(inputs, str(tmp_path), targets=targets, update=RANKS)
    plan = make_plan(config)
    stages = estimate(plan).stages
    # Four shards of ten on three workers: one of them has two.
    assert stages["targets"] == 20
    layers = len(plan.hparams.layers)
    # Ranks start during the last shard of ten, and are ready when it is done.
    assert stages["update"] == pytest.approx(40 * layers * 0.5 / 2)
    asked = {
        prompt
        for r in plan.table.requests
        for prompt in (r.text, *r.paraphrase_prompts, *r.neighborhood_prompts)
    }
    # Two parts for three workers.
    assert stages["measure before"] == pytest.approx(0.1 * -(-len(asked) // 2))
    assert len(samples) == 3
    assert [len(sample.requests) for sample in samples] == [10, 10, 10]
    assert len({r.subject + r.prompt for s in samples for r in s.requests}) == 30, "all over it"


def test_a_cluster_takes_what_as_many_cores_here_would_take(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    samples: list[Sample],
) -> None:
    def planned(workers: int) -> Plan:
        sections = {"targets": {"workers": workers, "shard_size": 10}, "update": RANKS}
        return make_plan(job(inputs, str(tmp_path), **sections))

    by_workers = estimate(planned(8)).by_workers
    assert list(by_workers) == [1, 2, 4]
    for count, seconds in by_workers.items():
        assert estimate(planned(count)).seconds == pytest.approx(seconds)


def test_more_workers_than_cores_take_turns(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    samples: list[Sample],
) -> None:
    targets = {"workers": 8, "shard_size": 5}
    config = job(inputs, str(tmp_path), targets=targets, update=RANKS)
    plan = make_plan(config)
    assert estimate(plan).stages["targets"] == 5 * 2
    assert len(samples) == 4


def test_a_job_for_gpus_is_not_estimated_without_any(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    plan = make_plan(
        job(inputs, str(tmp_path), targets={"workers": 1, "gpus_per_worker": 1}, update=RANKS)
    )
    with pytest.raises(JobError, match="this machine has none: estimate it on a machine like"):
        estimate(plan)


def test_no_more_replicas_are_opened_than_memory_holds(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(
        job(inputs, str(tmp_path), targets={"workers": 3, "shard_size": 10}, update=RANKS)
    )
    model = sum(tensor.size for tensor in plan.checkpoint.tensors.values())
    memory = SimpleNamespace(available=3 * model)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert estimate(plan).side_by_side == len(samples) == 2
    memory.available = model
    with pytest.raises(JobError, match=r"the model takes 0\.0 GiB and this machine has 0\.0 GiB"):
        estimate(plan)


def test_auto_counts_the_gpus_of_this_machine(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    sections = {"targets": {"gpus_per_worker": 2, "shard_size": 5}, "update": {"gpus_per_rank": 1}}
    found = estimate(make_plan(job(inputs, str(tmp_path), **sections)))
    assert (found.workers, found.ranks) == (2, 1)
    assert [sample.gpus for sample in samples] == [2]


@pytest.mark.slow
def test_rates_are_measured_in_processes_of_their_own(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    plan = make_plan(
        job(inputs, str(tmp_path / "out"), targets={"workers": 2, "shard_size": 4}, update=RANKS)
    )
    found = estimate(plan)
    assert set(found.stages) >= {"start", "second moments", "measure before", "targets", "update"}
    assert all(seconds > 0 for seconds in found.stages.values())
    assert found.worker_bytes > 100 * 2**20
    assert found.rank_bytes > 100 * 2**20
    assert not ray.is_initialized()
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_is_a_sentence(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A BLOOM model, as if it were not known that its prompts must run whole."""
    config = BloomConfig(vocab_size=700, hidden_size=32, n_layer=4, n_head=4)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    for file in (GOLDEN / "llama" / "model").glob("tokenizer*"):
        shutil.copy(file, model)
    (tmp_path / "hparams.json").write_text(json.dumps({"layers": [0, 1]}))
    # In the process that tries the work, too.
    (tmp_path / "sitecustomize.py").write_text(
        "import pmet.targets.mechanism\npmet.targets.mechanism.why_whole = lambda *_: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = {"model": str(model), "hparams": str(tmp_path / "hparams.json")}
    plan = make_plan(
        job(inputs, str(tmp_path / "out"), targets={"workers": 1}, update=RANKS, **asked)
    )
    with pytest.raises(
        WorkerError,
        match=r"^the model fails at a little of the job's own work \(RuntimeError: The size of "
        r"tensor .*\), and would fail at all of it; check that",
    ) as failed:
        estimate(plan)
    assert "Traceback" not in str(failed.value)
    assert "modeling_bloom.py" in failed.value.cause_text
