"""The end of a run: each input row is in exactly one of two files, whatever its outcome."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline import run
from pipeline.data.shards import plan_shards
from pipeline.data.tables import read_requests, targets_table
from pipeline.job.config import JobConfig
from pipeline.plan import Plan, _fitting, make_plan
from pipeline.progress import Progress
from pipeline.run_folder.folder import RunFolder
from pipeline.stages.context import Context, FoundTargets
from pipeline.stages.measurement import Measurement
from pipeline.workers.ray_executor import RayExecutor
from pmet.evaluation.figures import METRICS
from tests.conftest import GOLDEN, load_golden

GPT2 = GOLDEN / "gpt2"
# UTF-8 and invalid text: a lone surrogate as some writers encode it, half a character.
BAD = [b"", b" ", None, b"\xed\xa0\x80", b"B\xc3"]
TEXT = st.sampled_from([b"A", b"B", b" A", b"C", b"{}"]) | st.sampled_from([b"A", b"B", *BAD])
LONG = b"{} " + b"and so on " * 60
PROMPTS = st.sampled_from([b"{} is", b"{} was", b"{} are", b"is", None, b"{} {}", b"{}\xc3", LONG])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.just(b"{} is") | PROMPTS,
            "subject": TEXT,
            "target_new": TEXT,
            "note": TEXT,
        }
    ),
    min_size=1,
    max_size=16,
)


def written(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A request file with invalid bytes in its text."""
    columns = {
        name: pa.array([row[name] for row in rows], pa.binary()).view(pa.string())
        for name in ("prompt", "subject", "target_new", "note")
    }
    pq.write_table(pa.table(columns), path)


def planned(folder: Path, rows: Sequence[dict[str, Any]]) -> Plan:
    """Return a small plan with this input, or None if nothing in it can be edited."""
    written(folder / "requests.parquet", rows)
    base = small_plan(folder)
    table, groups = _fitting(
        read_requests(str(folder / "requests.parquet")),
        load_golden("gpt2").tokenizer,
        load_golden("gpt2").model.config,
        base.templates or [["{}"]],
        room=0,
        ending=base.ending,
        joint=True,
    )
    assume(len(table.requests) > 0)
    shards = plan_shards(len(table.requests), 3, groups)
    return replace(base, table=table, groups=groups, target_shards=shards)


@cache
def small_plan(folder: Path) -> Plan:
    """A job on the golden model."""
    row = {"prompt": b"{} is", "subject": b"A", "target_new": b"B", "note": b""}
    written(folder / "some.parquet", [row])
    job = JobConfig.model_validate(
        {
            "model": str(GPT2 / "model"),
            "requests": (str(folder / "some.parquet"),),
            "output": "unused",
            "hparams": str(GPT2 / "hparams.json"),
            "second_moments": str(GPT2 / "second_moments.safetensors"),
            "context_templates": str(GPT2 / "context_templates.json"),
        }
    )
    return make_plan(job)


def found_in(folder: RunFolder, plan: Plan, fates: Sequence[str]) -> FoundTargets:
    """Targets as the stage leaves them: requests without one may be in the file, or isolated."""
    found = FoundTargets()
    for shard in plan.target_shards:
        here = range(shard.start, shard.stop)
        fate = {plan.table.rows[i]: fates[i % len(fates)] for i in here}
        kept = [row for row, what in fate.items() if what in ("found", "nan")]
        found.failures |= {r: what for r, what in fate.items() if what in ("nan", "put aside")}
        found.known |= {row for row, what in fate.items() if what == "known"}
        values, ones = np.zeros((len(kept), 4), np.float32), np.ones(len(kept))
        found.files[shard.index] = f"targets/{shard.name}.parquet"
        table = targets_table(kept, values, ones.astype(np.int32), ones)
        folder.store.write_table(found.files[shard.index], table)
    return found


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=ROWS,
    fates=st.lists(st.sampled_from(["found", "nan", "put aside", "known"]), min_size=1, max_size=5),
    unmeasured=st.integers(1, 3),
)
def test_every_row_is_in_results_or_in_rejected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    fates: list[str],
    unmeasured: int,
) -> None:
    # Charts take most of the time.
    monkeypatch.setattr(run, "write_report", lambda _: None)
    plan = planned(tmp_path, rows)
    folder = RunFolder(f"memory://{uuid.uuid4().hex}")
    folder.begin(plan.digests, seed=0)
    found = found_in(folder, plan, fates)
    accepted = sorted(plan.table.rows)
    figures = dict.fromkeys(METRICS, 1.0) | {f"{name}_prompts": 1 for name in METRICS}
    measured = Measurement({r: {**figures, "answer": "x"} for r in accepted[::unmeasured]}, [])
    context = Context(plan, folder, cast(RayExecutor, None), Progress())
    result = run._conclude(context, found, measured, measured, found.known, ([], []))

    results = result.folder.read_table("results.parquet")
    rejected = result.folder.read_table("rejected.parquet")
    # Any reader can open them, whatever bytes the input had.
    results.validate(full=True)
    rejected.validate(full=True)
    edited, others = (table.column("row").to_pylist() for table in (results, rejected))
    assert sorted(edited + others) == list(range(len(rows)))
    assert edited == sorted(edited)
    assert others == sorted(others)
    assert set(edited) == {r for r in accepted if r not in found.failures}
    reasons = dict(zip(others, rejected.column("reason").to_pylist(), strict=True))
    codes = dict(zip(others, rejected.column("code").to_pylist(), strict=True))
    assert {row for row, code in codes.items() if code == "no-target"} == set(found.failures)
    assert all(reasons.values())
    assert all(reasons[row] == f"no target: {why}" for row, why in found.failures.items())
    assert result.metrics["counts"] == {
        "requested": len(rows),
        "edited": len(edited) - len(found.known),
        "rejected": len(others),
    }
    status = dict(zip(edited, results.column("status").to_pylist(), strict=True))
    assert {row for row, what in status.items() if what == "known"} == found.known
    # Rows keep their extra columns.
    subjects = results.column("subject").cast(pa.binary()).to_pylist()
    assert subjects == [rows[row]["subject"] for row in edited]
    whole = [row for row in others if all(is_text(value) for value in rows[row].values())]
    kept = dict(zip(others, rejected.column("note").to_pylist(), strict=True))
    assert all(kept[row] == decoded(rows[row]["note"]) for row in whole)


def is_text(value: bytes | None) -> bool:
    try:
        decoded(value)
    except UnicodeDecodeError:
        return False
    return True


def decoded(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
