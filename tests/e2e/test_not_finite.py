"""Nothing that is not a number is published; a run that met one resumes when its cause is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import serial
from pipeline.errors import NoEditError
from pipeline.replica import Replica, TargetSummary
from pipeline.run import run_job
from pipeline.store import Store
from pmet import NotFiniteError
from tests.conftest import GOLDEN
from tests.e2e.conftest import facts, job

BASE = GOLDEN / "gpt2"
WITHOUT_BOUND = {"v_lr": 1e6, "clamp_norm_factor": 1e30}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Four facts in this process, and hyper-parameters with changes."""
    requests, hparams = folder / "requests.parquet", folder / "hparams.json"
    pq.write_table(pq.read_table(folder / "all.parquet").slice(0, 4), requests)
    values = json.loads((BASE / "hparams.json").read_text())
    hparams.write_text(json.dumps(values | changes.pop("hparams", {})))
    return {
        "requests": (str(requests),),
        "hparams": str(hparams),
        "corpus": None,
        "second_moments": str(BASE / "second_moments.safetensors"),
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
    # The same job fails the same way at once, also with another number of ranks.
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
    # Float16 has 11 bits of a weight, and float32, which ranks hold, would round off next to none.
    assert all(1e-5 < layer["rounding"] < 0.1 for layer in layers)
    assert result.metrics["weights"]["rounding"] == max(layer["rounding"] for layer in layers)
    assert [gate["metric"] for gate in result.metrics["gates"]] == ["rounding"]


def test_a_model_whose_perplexity_is_infinite_is_held_with_a_sentence(
    inputs: Path, place: Path
) -> None:
    wild = settings(
        place,
        hparams=WITHOUT_BOUND,
        corpus=(str(inputs / "corpus.parquet"),),
        evaluate={"perplexity_texts": 2},
        gates={"perplexity_increase": 0.5},
    )
    result = run_job(job(inputs, str(place / "out"), **wild))
    assert result.status == "held"
    assert not torch.tensor(result.metrics["after"]["perplexity"]).isfinite()
    (gate,) = result.metrics["gates"]
    assert gate["note"] == "not a finite number, and nothing that is undefined passes"
    # Any reader of JSON opens it.
    text = (place / "out" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["after"]["perplexity"] == {
        "$numberDouble": "Infinity"
    }
    assert result.folder.read_json("metrics.json") == result.metrics
    report = (place / "out" / "report.html").read_text()
    assert "∞" in report
    assert "not a finite number, and nothing that is undefined passes" in report
    assert "Targets that diverged" in report
    changes = [e["text"] for e in said(str(place / "out"))["events"] if e["kind"] == "warning"]
    assert any(t.startswith("transformer.h.0.mlp.c_proj.weight: ‖Δ‖/‖W‖ is ") for t in changes)


class Unlucky(Replica):
    """A worker that finds no target while a file is there: its GPU computes nonsense, say."""

    def find_targets(
        self, source: Any, requests: Sequence[Any], rows: Sequence[int], *rest: Any
    ) -> TargetSummary:
        found = super().find_targets(source, requests, rows, *rest)
        if not Path(str(rest[-2].local_path("nonsense"))).exists():
            return found
        failures = dict.fromkeys(rows, "the loss is nan at evaluation 1")
        return TargetSummary(found.file, found.sha256, failures, found.early, found.count)


def test_a_run_that_edits_no_fact_fails_and_goes_on_once_the_cause_is_gone(
    inputs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial, "Replica", Unlucky)
    (place / "out").mkdir()
    (place / "out" / "nonsense").touch()
    four = job(inputs, str(place / "out"), **settings(place))
    expected = (
        "no fact was edited: none of 4 requests has a target, and nothing was published. The most "
        "frequent reasons: the loss is nan at evaluation 1 (4 of 4). Check the model, and v_lr and "
        "clamp_norm_factor in the hyper-parameters; the same command computes the targets again"
    )
    with pytest.raises(NoEditError) as error:
        run_job(four)
    assert str(error.value) == expected
    run = said(str(place / "out"))
    assert (run["status"], run["exit_status"], run["error"]) == ("failed", 1, expected)
    assert not (place / "out" / "model").exists()
    rejected = pq.read_table(place / "out" / "rejected.parquet")
    assert set(rejected["reason"].to_pylist()) == {"no target: the loss is nan at evaluation 1"}
    (place / "out" / "nonsense").unlink()
    result = run_job(four)
    assert (result.status, result.metrics["counts"]["edited"]) == ("complete", 4)
