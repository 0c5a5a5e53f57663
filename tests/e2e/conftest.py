"""A small real job: a golden model, forty of its facts, a few bad rows, its corpus."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from pipeline.cluster.session import ray_session
from pipeline.data.tables import read_targets
from pipeline.job.config import JobConfig
from pipeline.run import RunResult, run_job
from pipeline.storage.digest import digest_of
from pipeline.storage.store import Store
from tests.conftest import GOLDEN

GOOD_ROWS = 40

# Each of these is rejected, each for a different reason.
BAD_ROWS = [
    {"prompt": "nowhere to put it", "subject": "Kesear Group", "target_new": "ink"},
    {"prompt": "{} sells", "subject": "  ", "target_new": "ink"},
    {"prompt": "{} sells", "subject": "Kesear Group", "target_new": None},
    {"prompt": "{} sells", "subject": "Kesear Group", "target_new": ""},
    {"prompt": "{} " + "and so on " * 200, "subject": "Kesear Group", "target_new": "ink"},
]


def facts() -> list[dict[str, Any]]:
    """Golden facts as edit requests, with neighbors that have the same true target."""
    rows = json.loads((GOLDEN / "facts.json").read_text())
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows[GOOD_ROWS:]:
        alike[row["relation"], row["target_true"]].append(
            row["prompt"].replace("{}", row["subject"])
        )
    return [
        {
            "case_id": i,
            "prompt": row["prompt"],
            "subject": row["subject"],
            "target_new": row["target_new"],
            "target_true": row["target_true"],
            "paraphrase_prompts": [p.replace("{}", row["subject"]) for p in row["paraphrases"]],
            "neighborhood_prompts": alike[row["relation"], row["target_true"]][:3],
            "note": f"extra {i}",
        }
        for i, row in enumerate(rows[:GOOD_ROWS])
    ]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shared by all processes that run these tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def inputs(shared: Path) -> Path:
    """A folder with ``requests.parquet`` (bad rows among the good) and ``corpus.parquet``."""
    folder = shared / "inputs"
    with FileLock(shared / "inputs.lock"):
        if not folder.exists():
            folder.mkdir()
            write_inputs(folder)
    return folder


def write_inputs(folder: Path) -> None:
    good = facts()
    rows = good[:10] + BAD_ROWS + good[10:]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(good).schema),
        folder / "requests.parquet",
    )
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all runs of a module; logical CPUs for three workers and three ranks."""
    with ray_session("local", num_cpus=8):
        yield


Runner = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(inputs: Path, local_ray: None, shared: Path) -> Runner:
    """Runs the small job with changes; the same changes return the finished run."""

    def runner(family: str = "gpt2", **changes: Any) -> RunResult:
        key = digest_of([family, json.loads(json.dumps(changes, default=str))])
        output = shared / f"run-{key}" / "out"
        with FileLock(shared / f"run-{key}.lock"):
            if not output.exists():
                return run_job(job(inputs, str(output), family, **changes))
        found = Store(output)
        status = found.read_json("run.json")["status"]
        assert status in ("complete", "held"), "it has failed before"
        return RunResult(status, found, found.read_json("metrics.json"))

    return runner


def job(inputs: Path, output: str, family: str = "gpt2", **changes: Any) -> JobConfig:
    """The small job on a family's golden model."""
    values: dict[str, Any] = {
        "model": str(GOLDEN / family / "model"),
        "requests": (str(inputs / "requests.parquet"),),
        "output": output,
        "hparams": str(GOLDEN / family / "hparams.json"),
        "corpus": (str(inputs / "corpus.parquet"),),
        "context_templates": str(GOLDEN / family / "context_templates.json"),
        "targets": {"workers": 2},
        "update": {"ranks": 2},
    }
    return JobConfig.model_validate(values | changes)


def wait_until(what: Callable[[], Any], *, within_s: float, every_s: float) -> Any:
    """Wait until a call returns something true, and return it; the machine may be busy."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(every_s)
    raise AssertionError("it did not happen")


def worker_of(raylet: int) -> psutil.Process | None:
    """A process under a node's raylet that is currently computing targets."""
    for child in psutil.Process(raylet).children(recursive=True):
        if " ".join(child.cmdline()).startswith("ray::_WorkerProcess.call"):
            return child
    return None


def targets_by_row(folder: Store) -> dict[int, np.ndarray]:
    """All targets named by records of a run folder, by row of the input."""
    by_row: dict[int, np.ndarray] = {}
    for name in folder.glob("records/targets-*.json"):
        record = folder.read_json(f"records/{name}")
        arrays = read_targets(folder.read_table(record["file"]))
        by_row |= dict(zip(arrays.rows.tolist(), arrays.values, strict=True))
    return by_row


def assert_same_targets(expected: dict[int, np.ndarray], found: dict[int, np.ndarray]) -> None:
    """Assert equal rows with bit-equal values."""
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[r].view(np.int32), found[r].view(np.int32)) for r in found)


def assert_same_weights(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Assert that every weight differs from the expected one by rounding at most."""
    for name, weight in expected.items():
        apart = torch.linalg.norm(weight - found[name])
        assert apart <= 1e-6 * torch.linalg.norm(weight), name
