"""The contents of a run folder: status, metrics, job, and a row for every request.

The report, the comparison and trackers read them through this module.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RunFolderError
from pipeline.evaluation import FIGURES, is_number
from pipeline.run_folder.folder import STATUS
from pipeline.storage import Store, attempt

NEEDED = (STATUS, "metrics.json", "results.parquet")
REQUEST = ("row", "prompt", "subject", "target_new")
_WHEN = ("before", "after")
_TEXTS = ("answer", "chat_answer", "neighborhood_answers", "text")
_RESULT = (
    *(*REQUEST, "neighborhood_prompts", "case_id", "status", "steps", "loss", "first_loss"),
    *(f"{when}_{name}" for when in _WHEN for name in (*FIGURES, *_TEXTS)),
)
_RUN: dict[str, Any] = {
    "status": None,
    "stages": [],
    "layers": [],
    "events": [],
    "earlier": [],
    "versions": {},
    "digests": {},
    "origins": {},
}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run, as recorded in its folder.

    Attributes:
        store: the run folder.
        run: the contents of ``run.json``; every key that is always written is present.
        metrics: the contents of ``metrics.json``; empty if it does not exist yet.
        job: ``job.yaml``; empty if it does not exist.
        results: a row for every request that was not rejected, in input order, with its text,
            its optimisation and its figures; columns missing from the table are None.
        rejected: the other rows, each with its ``code`` and ``reason``.
    """

    store: Store
    run: dict[str, Any]
    metrics: dict[str, Any]
    job: str
    results: list[Row]
    rejected: list[Row]

    @property
    def counts(self) -> dict[str, Any]:
        """The number of requests, and how many were edited, rejected and so on."""
        return self.metrics.get("counts") or self.run.get("counts") or {}

    @property
    def before(self) -> dict[str, Any]:
        """The base model's figures."""
        return self.metrics.get("before") or {}

    @property
    def after(self) -> dict[str, Any]:
        """The edited model's figures."""
        return self.metrics.get("after") or {}

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The gates, with the values they checked."""
        return self.metrics.get("gates") or []

    def interval(self, when: str, name: str) -> Any:
        """The confidence interval of a figure, ``before`` or ``after``; None if unknown."""
        return ((self.metrics.get("intervals") or {}).get(when) or {}).get(name)

    def seconds(self) -> float | None:
        """Seconds from start to end of the last attempt, if both were recorded."""
        return _seconds(self.run, "finished_at")

    def attempts(self) -> list[dict[str, Any]]:
        """The earlier attempts: ``attempt``, ``status``, ``seconds`` until its last update,
        its ``stages``, how many ``events`` of each kind it had, and its ``error``."""
        return [
            {**attempt, "seconds": _seconds(attempt, "finished_at", "written_at")}
            for attempt in self.run["earlier"]
        ]

    def edited(self) -> list[Row]:
        """The results of requests that took part in the edit."""
        return [row for row in self.results if row["status"] != "known"]


def _seconds(attempt: Mapping[str, Any], *ends: str) -> float | None:
    """Seconds from the start to the first of these ends that was recorded."""
    said = next((attempt[name] for name in ends if attempt.get(name)), None)
    try:
        start, end = map(datetime.fromisoformat, (attempt["started_at"], said))
        return (end - start).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def read_run(store: Store) -> RunRecord:
    """Read a run folder; for an unfinished run, as much as there is.

    Raises:
        RunFolderError: there is no ``run.json``.
        StorageError: a file cannot be read.
    """
    if not store.exists(STATUS):
        raise RunFolderError(f"{store.url} is not a run folder: it has no run.json; check the path")
    return RunRecord(
        store=store,
        run=_RUN | _mapping(store, STATUS),
        metrics=_mapping(store, "metrics.json") if store.exists("metrics.json") else {},
        job=store.read_bytes("job.yaml").decode() if store.exists("job.yaml") else "",
        results=_rows(store, "results.parquet", _RESULT),
        rejected=_rows(store, "rejected.parquet", (*REQUEST, "code", "reason")),
    )


def _mapping(store: Store, name: str) -> dict[str, Any]:
    value = store.read_json(name)
    if not isinstance(value, dict):
        raise RunFolderError(f"{store.join(name)} was not written by a run; name a run's output")
    return value


def read_finished(store: Store) -> RunRecord:
    """Read the folder of a finished run, complete or held.

    Raises:
        RunFolderError: the run does not exist or is not finished.
        StorageError: a file cannot be read.
    """
    require_results(store)
    record = read_run(store)
    status = record.run["status"]
    if status not in ("complete", "held"):
        raise RunFolderError(
            f"{store.url} holds no finished run: it is {status}; run its job again until it ends"
        )
    return record


def require_results(store: Store) -> None:
    """Refuse a folder without the results of a run.

    Raises:
        RunFolderError: files are missing; the message names them.
    """
    missing = [name for name in NEEDED if not store.exists(name)]
    if missing:
        raise RunFolderError(
            f"{store.url} holds no finished run ({', '.join(missing)} missing); name the output of "
            "a job that has ended"
        )


def _rows(store: Store, name: str, columns: Sequence[str]) -> list[Row]:
    """The rows of a table with these columns; columns it lacks, or may lack, are None."""
    if not store.exists(name):
        return []
    table = read_columns(store, name, columns)
    held = [c for c in table.column_names if table.column(c).null_count < len(table)]
    nothing = dict.fromkeys(columns)
    found = [table.column(column).to_pylist() for column in held]
    rows = zip(*found, strict=True) if held else ([()] * len(table))
    return [ChainMap(dict(zip(held, row, strict=True)), nothing) for row in rows]


def read_columns(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """Read those of these columns that a Parquet file has; no others are fetched.

    Raises:
        StorageError: it cannot be read.
    """
    with store.read_stream(name) as stream:
        there = attempt("read", store.join(name), pq.read_schema, stream).names
    return store.read_table(name, [column for column in columns if column in there])


def layers(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The edited layers, each with a short ``name`` and Δ's ``share`` of the weight."""
    found = []
    for index, layer in enumerate(run["layers"]):
        number = re.search(r"\.(\d+)\.", str(layer["parameter"]))
        share = share_of(layer["delta_norm"], layer["weight_norm"])
        name = number.group(1) if number else f"#{index + 1}"
        found.append({**layer, "name": name, "share": share})
    return found


def share_of(delta_norm: float, weight_norm: float) -> float:
    """‖Δ‖/‖W‖; infinite if a weight of zeros was changed."""
    if weight_norm:
        return delta_norm / weight_norm
    return math.inf if delta_norm else 0.0


def throughput(stage: Mapping[str, Any], record: RunRecord) -> tuple[float, str] | None:
    """A stage's throughput per second, and its unit; None if unknown.

    Work done by an earlier attempt or another run is not counted.
    """
    seconds, detail = stage["seconds"], stage.get("detail") or {}
    if not (is_number(seconds) and seconds > 0):
        return None
    match stage["name"]:
        case "targets":
            done, unit = detail.get("found"), "targets"
        case "second moments":
            done, unit = None if detail.get("reused") else detail.get("tokens"), "tokens"
        case "update":
            whole = record.run["layers"] and not detail.get("reused")
            done, unit = record.run["layers"][0].get("requests") if whole else None, "requests"
        case "measure before" | "measure after" as name:
            when = name.rpartition(" ")[2]
            asked = sum(_was_measured(row, when) for row in record.results)
            done, unit = asked - detail.get("stored", 0), "requests"
        case "harness before" | "harness after":
            done, unit = detail.get("requests"), "requests"
        case _:
            return None
    return (done / seconds, unit) if is_number(done) and done > 0 else None


def _was_measured(row: Row, when: str) -> bool:
    return any(row[f"{when}_{name}"] is not None for name in FIGURES)


def show_rate(rate: tuple[float, str] | None) -> str:
    """The result of ``throughput`` as text; empty if there is none."""
    if rate is None:
        return ""
    count, unit = rate
    return f"{count:,.0f} {unit}/s" if count >= 100 else f"{count:.3g} {unit}/s"


def event_counts(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The number of events of each kind, in order of first occurrence."""
    counts: dict[str, int] = {}
    for event in events:
        kind = str(event["kind"])
        counts[kind] = counts.get(kind, 0) + 1
    return counts
