"""A request for which no target can be found is rejected, and the others are edited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.run import run_job
from pipeline.workers import ray_executor
from pipeline.workers.worker import ModelWorker, TargetSummary, TargetTask
from pmet import EditRequest
from pmet.model.tokenization import tokenize_prompt
from tests.conftest import GOLDEN, load_golden
from tests.e2e.conftest import BAD_ROWS, GOOD_ROWS, facts, job, targets_by_row

VICTIM = 5


class Fragile(ModelWorker):
    """A worker that fails whenever a certain request is computed."""

    def find_targets(self, task: TargetTask) -> TargetSummary:
        if any(request.case_id == VICTIM for request in task.requests):
            raise RuntimeError("the library fell over")
        return super().find_targets(task)


def token_of_one_request_only() -> int:
    """A token of the victim's subject that no other request has."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "gptj" / "model")
    used = [
        set(tokenize_prompt(tokenizer, EditRequest(f["prompt"], f["subject"], f["target_new"])).ids)
        for f in facts()
    ]
    others = set().union(*(ids for i, ids in enumerate(used) if i != VICTIM))
    return min(used[VICTIM] - others)


def published() -> dict[int, np.ndarray]:
    """The published targets of some of the facts, the victim among them, by row of the input."""
    golden = load_golden("gpt2")
    rows = [row for row in range(GOOD_ROWS + len(BAD_ROWS)) if not 10 <= row < 10 + len(BAD_ROWS)]
    by_fact = {(f["prompt"], f["subject"]): row for f, row in zip(facts(), rows, strict=True)}
    found = {
        by_fact.get((request.prompt, request.subject)): target.numpy()
        for request, target in zip(golden.requests, golden.expected["targets"], strict=True)
    }
    return {row: target for row, target in found.items() if row is not None}


def test_not_a_number_costs_one_row_only(inputs: Path, local_ray: None, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "gptj" / "model", base)
    weights = load_file(base / "model.safetensors")
    # Finite, but its square overflows in the norm.
    weights["transformer.wte.weight"][token_of_one_request_only(), ::2] = 3e38
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    result = run_job(
        job(
            inputs,
            str(tmp_path / "out"),
            "gptj",
            model=str(base),
            corpus=None,
            second_moments=str(GOLDEN / "gptj" / "second_moments.safetensors"),
            targets={"workers": 1},
            update={"ranks": 1},
        )
    )
    assert result.status == "complete"
    assert result.metrics["counts"]["edited"] == GOOD_ROWS - 1
    assert result.metrics["counts"]["rejected"] == len(BAD_ROWS) + 1
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    (victim,) = [r for r in rejected if r["case_id"] == VICTIM]
    assert victim["reason"].startswith("no target: the loss is nan at evaluation 1")
    results = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert VICTIM not in [r["case_id"] for r in results]
    edited = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert edited["transformer.h.0.mlp.fc_out.weight"].isfinite().all()


def test_a_request_that_no_worker_survives_costs_one_row_only(
    inputs: Path, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "ModelWorker", Fragile)
    fragile = job(
        inputs,
        str(tmp_path / "out"),
        corpus=None,
        second_moments=str(GOLDEN / "gpt2" / "second_moments.safetensors"),
        targets={"workers": 1},
        update={"ranks": 1},
    )
    result = run_job(fragile)
    assert result.metrics["counts"]["edited"] == GOOD_ROWS - 1
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    (victim,) = [r for r in rejected if r["case_id"] == VICTIM]
    assert victim["reason"].startswith(
        "no target: it fails on every worker, even alone (RuntimeError: the library fell over"
    )
    values, expected = targets_by_row(result.folder), published()
    assert len(values) == GOOD_ROWS - 1
    apart = [
        np.linalg.norm(values[row] - target) / np.linalg.norm(target)
        for row, target in expected.items()
        if row in values
    ]
    assert len(apart) == len(expected) - 1 > 3
    # The composition of a batch affects only rounding, which an optimisation may amplify.
    assert np.median(apart) <= 2e-5
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [e["kind"] for e in said["events"] if e["kind"] == "isolated"] == ["isolated"]
    # The same run again finds all results in the folder.
    tables = {f.name: f.read_bytes() for f in (tmp_path / "out" / "targets").iterdir()}
    again = run_job(fragile)
    assert again.metrics["counts"] == result.metrics["counts"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "out" / "targets").iterdir()} == tables
