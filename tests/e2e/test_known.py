"""A run that leaves out what the base already answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

from pipeline.run import RunResult, run_job
from tests.conftest import GOLDEN
from tests.e2e.conftest import facts, job

# The base answers the first with their true target, and none of the others with its new one.
KNOWN, NEW = [0, 3, 5, 6, 8, 9], [1, 4, 7, 10, 11, 12]


def skipping(inputs: Path, folder: Path, places: list[int], **changes: Any) -> RunResult:
    chosen = facts()
    for place in KNOWN:
        chosen[place]["target_new"] = chosen[place]["target_true"]
    pq.write_table(pa.Table.from_pylist([chosen[p] for p in places]), folder / "requests.parquet")
    values = {"requests": (str(folder / "requests.parquet"),), "skip_known": True}
    values |= {"corpus": None, "targets": {"workers": 1}, "update": {"ranks": 1}}
    values["second_moments"] = str(GOLDEN / "gpt2" / "second_moments.safetensors")
    return run_job(job(inputs, str(folder / "run"), **values | changes))


def test_known_requests_are_not_edited_but_measured(
    inputs: Path, local_ray: None, tmp_path: Path
) -> None:
    result = skipping(inputs, tmp_path, sorted(KNOWN + NEW), evaluate={"sample": 6})
    counts = {"requested": 12, "rejected": 0, "edited": 6, "known": 6}
    assert result.metrics["counts"] == counts
    run = result.folder.read_json("run.json")
    assert {layer["requests"] for layer in run["layers"]} == {len(NEW)}
    rows = result.folder.read_table("results.parquet").to_pylist()
    assert [r["case_id"] for r in rows if r["status"] == "known"] == KNOWN
    assert all((r["steps"] is None) == (r["status"] == "known") for r in rows)
    assert sum(r["after_answer"] is not None for r in rows) == 6
    known = [r for r in rows if r["status"] == "known"]
    assert all(r["before_efficacy_strict"] == 1.0 for r in known)
    kept = sum(r["after_efficacy_strict"] for r in known) / len(known)
    assert result.metrics["known"] == {"still_answered": kept}
    assert result.metrics["before"]["efficacy_strict"] == 0.0, "the scores are of the edited ones"


def test_where_all_is_known_the_model_is_the_bases(
    inputs: Path, local_ray: None, tmp_path: Path
) -> None:
    result = skipping(inputs, tmp_path, KNOWN, gates={"efficacy": 0.5})
    assert result.status == "complete"
    assert result.metrics["counts"]["edited"] == 0
    assert result.metrics["known"] == {"still_answered": 1.0}
    assert result.metrics["gates"] == []
    base = load_file(GOLDEN / "gpt2" / "model" / "model.safetensors")
    edited = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(base[name].equal(edited[name]) for name in base)
    assert "Nothing to edit" in (tmp_path / "run" / "report.html").read_text()
    stages = [s["name"] for s in result.folder.read_json("run.json")["stages"]]
    assert "update" not in stages
