"""A whole job, from Parquet to checkpoint: in this process, and through Ray and DeepSpeed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cluster import RankGroup, WorkerPool
from pipeline.data.tables import read_targets
from pipeline.run import RunResult, run_job
from pipeline.workers import KeptWorkers
from pmet import Edit, EditRequest, evaluate
from tests.conftest import GOLDEN
from tests.e2e.conftest import (
    BAD_ROWS,
    GOOD_ROWS,
    Runner,
    assert_same_targets,
    assert_same_weights,
    facts,
    job,
    targets_by_row,
)

STAGES = ["second moments", "targets", "measure before", "update", "publish", "measure after"]


def folder(result: RunResult) -> Path:
    path = result.folder.local_path()
    assert path is not None
    return path


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(folder(result) / "model" / "model.safetensors")


def targets(result: RunResult) -> tuple[np.ndarray, np.ndarray]:
    """Return values and steps of all requests, in order."""
    files = sorted((folder(result) / "targets").glob("*.parquet"))
    parts = [read_targets(pq.read_table(file)) for file in files]
    return np.concatenate([p.values for p in parts]), np.concatenate([p.steps for p in parts])


def edited_names(result: RunResult) -> list[str]:
    return [layer["parameter"] for layer in run_json(result)["layers"]]


def run_json(result: RunResult) -> dict[str, Any]:
    return json.loads((folder(result) / "run.json").read_text())


def plain(name: str) -> str:
    """Return a file's name without the suffix of the attempt that wrote it."""
    return re.sub(r"-[0-9a-f]{32}", "", name)


def record_is_whole(result: RunResult, name: str) -> bool:
    """Whether all files named by a record exist as recorded."""
    record = result.folder.read_json(f"records/{name}")
    files = record.get("files", {}) | (
        {record["file"]: record["sha256"]} if "file" in record else {}
    )
    return record["bytes"].keys() == files.keys() and all(
        result.folder.sha256(file) == digest and result.folder.size(file) == record["bytes"][file]
        for file, digest in files.items()
    )


def test_the_run_folder_has_all_that_is_promised(run: Runner) -> None:
    result = run()
    assert result.status == "complete"
    for name in (
        "run.json",
        "job.yaml",
        "rejected.parquet",
        "targets",
        "delta",
        "model",
        "results.parquet",
        "metrics.json",
        "report.html",
    ):
        assert (folder(result) / name).exists(), name
    status = run_json(result)
    assert status["status"] == "complete"
    assert [s["name"] for s in status["stages"]] == STAGES
    assert status["versions"]["torch"] == torch.__version__


def test_every_row_is_in_results_or_rejected(run: Runner) -> None:
    result = run()
    results = pq.read_table(folder(result) / "results.parquet").to_pylist()
    rejected = pq.read_table(folder(result) / "rejected.parquet").to_pylist()
    rows = [r["row"] for r in results] + [r["row"] for r in rejected]
    assert sorted(rows) == list(range(GOOD_ROWS + len(BAD_ROWS)))
    reasons = " | ".join(r["reason"] for r in rejected)
    for expected in ("exactly one {}", "subject is empty", "target_new is null", "reads 128"):
        assert expected in reasons
    assert result.metrics["counts"] == {
        "requested": GOOD_ROWS + len(BAD_ROWS),
        "rejected": len(BAD_ROWS),
        "edited": GOOD_ROWS,
    }
    assert {r["note"] for r in results} == {f["note"] for f in facts()}


def test_a_hyper_parameter_file_of_memit_gives_the_same_targets_and_weights(
    run: Runner, tmp_path: Path
) -> None:
    memit = json.loads((GOLDEN / "gpt2" / "hparams.json").read_text()) | {
        "attn_module_tmp": "transformer.h.{}.attn",
        "mlp_module_tmp": "transformer.h.{}.mlp",
        "alg_name": "AlphaEdit",
        "nullspace_threshold": 0.02,
    }
    del memit["rewrite_module_tmps"], memit["nll_loss_factor"]
    path = tmp_path / "memit.json"
    path.write_text(json.dumps(memit))
    expected, found = run(), run(hparams=str(path))
    assert_same_targets(targets_by_row(expected.folder), targets_by_row(found.folder))
    assert_same_weights(weights(expected), weights(found))
    said = [event["text"] for event in run_json(found)["events"] if event["kind"] == "warning"]
    assert (
        f"{path}: these hyper-parameters of other methods and tools have no effect here: "
        "alg_name, nullspace_threshold"
    ) in said


def test_the_published_model_knows_the_facts(run: Runner) -> None:
    result = run()
    metrics = result.metrics
    assert metrics["before"]["efficacy"] < 0.1
    assert metrics["after"]["efficacy"] > 0.7
    model = AutoModelForCausalLM.from_pretrained(folder(result) / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder(result) / "model")
    requests = [
        EditRequest(
            f["prompt"],
            f["subject"],
            f["target_new"],
            target_true=f["target_true"],
            paraphrase_prompts=f["paraphrase_prompts"],
            neighborhood_prompts=f["neighborhood_prompts"],
        )
        for f in facts()
    ]
    measured = evaluate(model, tokenizer, requests)
    for name in ("efficacy", "generalization", "specificity", "specificity_strict", "score"):
        assert measured[name] == pytest.approx(metrics["after"][name], abs=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_edited_tensors_differ_from_the_base(run: Runner, family: str) -> None:
    result = run(family)
    base, edited = load_file(GOLDEN / family / "model" / "model.safetensors"), weights(result)
    names = set(edited_names(result))
    assert names == {n for n in base if not torch.equal(base[n], edited[n])}
    for file in (GOLDEN / family / "model").iterdir():
        if file.suffix != ".safetensors":
            assert (folder(result) / "model" / file.name).read_bytes() == file.read_bytes()


def test_the_delta_applies_to_the_base_and_undoes_the_edit(run: Runner) -> None:
    result = run()
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "gpt2" / "model")
    original = {n: p.detach().clone() for n, p in base.named_parameters()}
    edit = Edit.load(folder(result) / "delta")
    edit.apply(base)
    published = AutoModelForCausalLM.from_pretrained(folder(result) / "model")
    for name, parameter in published.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name
    edit.revert(published)
    for name, parameter in published.named_parameters():
        assert torch.equal(parameter, original[name]), name


# `tests.e2e.test_resume` has a run on two ranks, and the next test one on a single one.
def test_a_run_on_ray_is_that_of_this_process(run: Runner, local_ray: None) -> None:
    here = run()
    there = run(targets={"workers": 3}, update={"ranks": 3})
    for one, two in zip(targets(here), targets(there), strict=True):
        assert np.array_equal(one.view(np.uint8), two.view(np.uint8))
    # Three ranks do not divide any of these weights evenly.
    edited = edited_names(here)
    assert weights(here)[edited[0]].numel() % 3 != 0
    assert edited_names(there) == edited
    assert_same_weights(weights(here), weights(there))
    moments = "second_moments/second_moments.safetensors"
    assert here.folder.sha256(moments) == there.folder.sha256(moments)
    assert sorted(map(plain, here.folder.list())) == sorted(map(plain, there.folder.list()))
    assert there.metrics["counts"] == here.metrics["counts"]
    figures, expected = (
        {name: value for name, value in each.metrics["after"].items() if value is not None}
        for each in (there, here)
    )
    assert figures == pytest.approx(expected, rel=1e-4)
    results, others = (
        each.folder.read_table("results.parquet").select(["row", "status", "steps", "note"])
        for each in (here, there)
    )
    assert results.equals(others)
    run_there = run_json(there)
    assert run_there["status"] == "complete"
    assert [s["name"] for s in run_there["stages"]] == STAGES


def test_runs_on_kept_workers_are_those_of_other_runs(
    run: Runner, inputs: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def noted(of: Any, method: str) -> None:
        before = getattr(of, method)

        def counted(*args: Any, **more: Any) -> Any:
            started.append(of.__name__)
            return before(*args, **more)

        monkeypatch.setattr(of, method, counted)

    noted(WorkerPool, "_start")
    noted(RankGroup, "_begin")
    alone = run("llama")
    changes: dict[str, Any] = {
        "family": "llama",
        "targets": {"workers": 2},
        "corpus": None,
        "second_moments": str(folder(alone) / "second_moments"),
    }
    with KeptWorkers() as kept:
        # A small model is updated in this process if the number of ranks is left open.
        for ranks in (1, "auto"):
            output, update = str(tmp_path / f"{ranks}"), {"update": {"ranks": ranks}}
            result = run_job(job(inputs, output, **changes, **update), kept=kept)
            assert_same_targets(targets_by_row(alone.folder), targets_by_row(result.folder))
            assert_same_weights(weights(alone), weights(result))
    assert sorted(started) == ["RankGroup", "WorkerPool", "WorkerPool"]


def test_the_size_of_shards_changes_only_rounding(run: Runner) -> None:
    # By default forty requests make two shards.
    small = run()
    large = run(
        targets={"workers": 0, "shard_size": 64},
        second_moments=str(folder(small) / "second_moments"),
        corpus=None,
    )
    one, two = targets(small)[0], targets(large)[0]
    relative = np.linalg.norm(one - two, axis=1) / np.linalg.norm(one, axis=1)
    assert np.median(relative) <= 2e-5
    for name, value in small.metrics["after"].items():
        if name not in ("perplexity", "agreement") and value is not None:
            assert abs(value - large.metrics["after"][name]) <= 0.005, name


def test_second_moments_templates_and_gates(run: Runner, inputs: Path, tmp_path: Path) -> None:
    kept = str(tmp_path / "moments")
    gates = {"efficacy": 0.5, "specificity": 1.0, "perplexity_increase": 10.0}
    gates |= {"specificity_drop": 1.0, "agreement": 0.1, "fluency": 9.9}
    gates |= {"efficacy_strict_drop_since_last": 0.0}
    held = run_job(
        job(
            inputs,
            str(tmp_path / "held"),
            second_moments=kept,
            context_templates=None,
            gates=gates,
            evaluate={"sample": 12, "fluency": True, "group_by": "target_true"},
        )
    )
    assert held.status == "held"
    passed = {gate["name"]: gate["passed"] for gate in held.metrics["gates"]}
    assert {metric for metric in gates if not passed[metric]} == {"specificity", "fluency"}
    metrics = json.loads((tmp_path / "held" / "metrics.json").read_text())
    assert metrics == held.metrics
    assert 0.1 < metrics["after"]["agreement"] < 1.0
    assert metrics["after"]["fluency"] > 1.0
    for when in ("before", "after"):
        measured = {n for n, value in metrics[when].items() if value is not None}
        assert metrics["intervals"][when].keys() == measured
        for name, (low, high) in metrics["intervals"][when].items():
            assert low <= metrics[when][name] <= high, name
    assert metrics["groups"]["column"] == "target_true"
    assert sum(group["requests"] for group in metrics["groups"]["rows"]) == 12
    assert (tmp_path / "held" / "model" / "model.safetensors").exists()
    templates = json.loads((tmp_path / "held" / "context_templates.json").read_text())
    assert len(templates[1]) == 5
    results = pq.read_table(tmp_path / "held" / "results.parquet")
    assert results.num_rows == GOOD_ROWS
    for column in ("after_efficacy", "before_fluency", "after_text"):
        assert results.column(column).null_count == GOOD_ROWS - 12
    # The second run reads what the first one saved, and needs no corpus.
    again = run_job(job(inputs, str(tmp_path / "again"), second_moments=kept, corpus=None))
    assert "second moments" not in [s["name"] for s in run_json(again)["stages"]]
    for name in edited_names(again):
        torch.testing.assert_close(weights(again)[name], weights(run())[name], rtol=1e-6, atol=1e-8)
