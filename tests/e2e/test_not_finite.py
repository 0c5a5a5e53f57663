"""Non-finite numbers are never published; the run resumes once their cause is gone."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.errors import NoEditError
from pipeline.run import run_job
from pipeline.stages.measurement import held_out
from pipeline.storage.store import Store
from pipeline.workers import serial_executor
from pipeline.workers.worker import ModelWorker, TargetSummary, TargetTask
from pmet import NotFiniteError
from tests.conftest import GOLDEN
from tests.e2e.conftest import facts, job

BASE = GOLDEN / "gpt2"
WITHOUT_BOUND = {"v_lr": 1e6, "clamp_norm_factor": 1e30}


def settings(folder: Path, family: str = "gpt2", **changes: Any) -> dict[str, Any]:
    """Four facts in this process, and hyper-parameters with changes."""
    requests, hparams = folder / "requests.parquet", folder / "hparams.json"
    pq.write_table(pq.read_table(folder / "all.parquet").slice(0, 4), requests)
    values = json.loads((GOLDEN / family / "hparams.json").read_text())
    hparams.write_text(json.dumps(values | changes.pop("hparams", {})))
    return {
        "requests": (str(requests),),
        "hparams": str(hparams),
        "corpus": None,
        "second_moments": str(GOLDEN / family / "second_moments.safetensors"),
        "targets": {"workers": 0},
        "update": {"ranks": 0},
    } | changes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(facts()), tmp_path / "all.parquet")
    return tmp_path


def in_float16(folder: Path) -> str:
    shutil.copytree(BASE / "model", folder)
    weights = load_file(BASE / "model" / "model.safetensors")
    halved = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halved, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return str(folder)


def said(output: str) -> dict[str, Any]:
    return dict(Store(output).read_json("run.json"))


def test_an_edit_that_float16_cannot_hold_is_not_published(
    inputs: Path, local_ray: None, place: Path
) -> None:
    base, output = in_float16(place / "base"), str(place / "out")
    wild = settings(place, model=base, hparams=WITHOUT_BOUND)
    shared = {"targets": {"workers": 1}, "update": {"ranks": 2}}
    with pytest.raises(NotFiniteError) as first:
        run_job(job(inputs, output, **wild | shared))
    text = str(first.value)
    assert text.startswith(
        "the edited weight of layer 0 (transformer.h.0.mlp.c_proj.weight) does not fit its dtype, "
        "float16: the largest |W + Δ| is "
    )
    assert "float16 holds at most 65504; ‖Δ‖/‖W‖ is " in text
    assert text.endswith(
        "Lower clamp_norm_factor or v_lr in the hyper-parameters, or store the model in bfloat16 "
        "or float32"
    )
    run = said(output)
    assert (run["status"], run["exit_status"], run["error"]) == ("failed", 1, text)
    assert not [event for event in run["events"] if event["kind"] == "retry"]
    (diverged,) = [event["text"] for event in run["events"] if event["kind"] == "warning"]
    assert diverged.startswith("4 of 4 targets ended with a loss more than 1 above the first one")
    assert not (place / "out" / "model").exists()
    assert not list((place / "out" / "delta").glob("*.safetensors"))
    # The same job fails the same way at once, even with another number of ranks.
    with pytest.raises(NotFiniteError) as again:
        run_job(job(inputs, output, **wild))
    assert str(again.value) == text
    (stage,) = [stage for stage in said(output)["stages"] if stage["name"] == "targets"]
    assert stage["detail"]["shards"] == 0
    # The remedy that the message names.
    tame = settings(place, model=base, gates={"rounding": 0.5})
    result = run_job(job(inputs, output, **tame), fresh=True)
    assert result.status == "complete"
    published = load_file(place / "out" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in published.values())
    layers = said(output)["layers"]
    assert {layer["dtype"] for layer in layers} == {"float16"}
    # Float16 keeps 11 bits of a weight; float32, which ranks hold, would round off almost nothing.
    assert all(1e-5 < layer["rounding"] < 0.1 for layer in layers)
    assert result.metrics["weights"]["rounding"] == max(layer["rounding"] for layer in layers)
    assert [gate["name"] for gate in result.metrics["gates"]] == ["rounding"]


def with_a_text_of_no_finite_loss(folder: Path, inputs: Path) -> str:
    """A finite base without a finite perplexity: a token overflows the squares of the norm."""
    shutil.copytree(GOLDEN / "gptj" / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = held_out(pq.read_table(inputs / "corpus.parquet")["text"].to_pylist(), 2, 8192)
    templates = json.loads((GOLDEN / "gptj" / "context_templates.json").read_text())
    asked = json.dumps([facts()[:4], templates], ensure_ascii=False)
    used = {token for word in asked.split() for token in tokenizer(f" {word}")["input_ids"]}
    used |= set(tokenizer(asked)["input_ids"])
    token = next(t for t in tokenizer(texts[0])["input_ids"][1:] if t not in used)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][token, ::2] = 3e38
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return str(folder)


def test_a_figure_that_is_undefined_is_recorded_shown_and_held_with_a_sentence(
    inputs: Path, place: Path
) -> None:
    wild = settings(
        place,
        family="gptj",
        hparams=WITHOUT_BOUND,
        model=with_a_text_of_no_finite_loss(place / "base", inputs),
        corpus=(str(inputs / "corpus.parquet"),),
        evaluate={"perplexity_texts": 2},
        gates={"perplexity_increase": 0.5},
    )
    result = run_job(job(inputs, str(place / "out"), "gptj", **wild))
    assert result.status == "held"
    assert said(str(place / "out"))["exit_status"] == 3
    assert math.isnan(result.metrics["after"]["perplexity"])
    (gate,) = result.metrics["gates"]
    assert gate["note"] == "not a finite number, and nothing that is undefined passes"
    # Any JSON reader can open it.
    text = (place / "out" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["after"]["perplexity"] == {
        "$numberDouble": "NaN"
    }
    assert math.isnan(result.folder.read_json("metrics.json")["after"]["perplexity"])
    report = (place / "out" / "report.html").read_text()
    assert "undefined" in report
    assert "not a finite number, and nothing that is undefined passes" in report
    # Unbounded edits are finite in float32, and cause a warning.
    assert "Targets that diverged" in report
    changes = [e["text"] for e in said(str(place / "out"))["events"] if e["kind"] == "warning"]
    assert any(t.startswith("transformer.h.1.mlp.fc_out.weight: ‖Δ‖/‖W‖ is ") for t in changes)
    published = load_file(place / "out" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in published.values())
    # The same command reads the record of the measurement.
    assert run_job(job(inputs, str(place / "out"), "gptj", **wild)).status == "held"


class Unlucky(ModelWorker):
    """A worker that finds no target, as if its GPU computed nonsense."""

    def find_targets(self, task: TargetTask) -> TargetSummary:
        found = super().find_targets(task)
        return replace(found, failures=dict.fromkeys(task.rows, "the loss is nan at evaluation 1"))


def test_a_run_that_edits_no_fact_fails_and_goes_on_once_the_cause_is_gone(
    inputs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = job(inputs, str(place / "out"), **settings(place))
    expected = (
        "no fact was edited: none of 4 requests has a target, and nothing was published. The most "
        "frequent reasons: the loss is nan at evaluation 1 (4 of 4). Check the model, and v_lr and "
        "clamp_norm_factor in the hyper-parameters; the same command computes the targets again"
    )
    with monkeypatch.context() as patched:
        patched.setattr(serial_executor, "ModelWorker", Unlucky)
        with pytest.raises(NoEditError) as error:
            run_job(four)
    assert str(error.value) == expected
    run = said(str(place / "out"))
    assert (run["status"], run["exit_status"], run["error"]) == ("failed", 1, expected)
    assert not (place / "out" / "model").exists()
    rejected = pq.read_table(place / "out" / "rejected.parquet")
    assert set(rejected["reason"].to_pylist()) == {"no target: the loss is nan at evaluation 1"}
    result = run_job(four)
    assert (result.status, result.metrics["counts"]["edited"]) == ("complete", 4)
