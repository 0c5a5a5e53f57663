"""A run that skips requests that the base already answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pipeline.run import RunResult, run_job
from tests.conftest import GOLDEN
from tests.e2e.conftest import facts, job

# The base answers the first ones with their true target, and none of the others with its new one.
KNOWN, NEW = [0, 3, 5, 6, 8, 9], [1, 4, 7, 10, 11, 12]
EVIL = "</td><script>alert(1)</script> ``` {{ 7 * 7 }} ../../evil"


def skipping(
    inputs: Path,
    folder: Path,
    places: list[int],
    extra: Mapping[str, str] | None = None,
    bad: Mapping[str, str] | None = None,
    **changes: Any,
) -> RunResult:
    chosen = facts()
    for place in KNOWN:
        chosen[place]["target_new"] = chosen[place]["target_true"]
    rows = [chosen[p] | {"case_id": f"../../evil{p}"} | dict(extra or {}) for p in places]
    rows += [dict(bad)] if bad else []
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
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
    known = [r for r in rows if r["status"] == "known"]
    assert [r["case_id"] for r in known] == [f"../../evil{place}" for place in KNOWN]
    assert all((r["steps"] is None) == (r["status"] == "known") for r in rows)
    assert sum(r["after_answer"] is not None for r in rows) == 6
    assert all(r["before_efficacy_strict"] == 1.0 for r in known)
    kept = sum(r["after_efficacy_strict"] for r in known) / len(known)
    assert result.metrics["known"] == {"still_answered": kept}
    assert result.metrics["before"]["efficacy_strict"] == 0.0, "the scores are of the edited ones"


@pytest.fixture(scope="module")
def all_known(
    inputs: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunResult]:
    """A run of known facts only, with hostile names and texts."""
    folder = tmp_path_factory.mktemp("known")
    evil = {"relation": EVIL, EVIL: EVIL, "../../evil": "../../evil"}
    bad = {"prompt": EVIL, "subject": EVIL, "target_new": EVIL, "case_id": EVIL}
    return folder, skipping(inputs, folder, KNOWN, evil, bad, gates={"efficacy": 0.5})


def test_where_all_is_known_the_model_is_the_bases(all_known: tuple[Path, RunResult]) -> None:
    folder, result = all_known
    assert result.status == "complete"
    counts = {"requested": 7, "rejected": 1, "edited": 0, "known": 6}
    assert result.metrics["counts"] == counts
    assert result.metrics["known"] == {"still_answered": 1.0}
    assert result.metrics["gates"] == []
    base = load_file(GOLDEN / "gpt2" / "model" / "model.safetensors")
    edited = load_file(folder / "run" / "model" / "model.safetensors")
    assert all(base[name].equal(edited[name]) for name in base)
    assert "Nothing to edit" in (folder / "run" / "report.html").read_text()
    stages = [s["name"] for s in result.folder.read_json("run.json")["stages"]]
    assert "update" not in stages


def test_names_and_texts_of_the_input_stay_data(all_known: tuple[Path, RunResult]) -> None:
    folder, result = all_known
    assert {p.name for p in folder.iterdir()} == {"requests.parquet", "run"}
    assert not [*folder.rglob("*evil*"), *folder.parent.glob("*evil*")]
    for name in ("report.html", "model/README.md"):
        assert "<script>" not in (folder / "run" / name).read_text()
    rows = result.folder.read_table("results.parquet").to_pylist()
    assert [r["case_id"] for r in rows] == [f"../../evil{place}" for place in KNOWN]
    assert all(
        (r["relation"], r[EVIL], r["../../evil"]) == (EVIL, EVIL, "../../evil") for r in rows
    )
    (rejected,) = result.folder.read_table("rejected.parquet").to_pylist()
    assert (rejected["case_id"], rejected["prompt"]) == (EVIL, EVIL)
    assert "holds 0 places for the subject" in rejected["reason"]
