"""The report of a run: one HTML page that needs nothing but itself.

Everything that comes from data is escaped, long texts and long tables are cut (and say so), and
the page forbids itself scripts and the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from pipeline.charts import histogram, layer_chart, score_chart
from pipeline.errors import RunFolderError
from pipeline.page import Cut, is_number, page
from pipeline.results import FRACTIONS
from pipeline.store import Store

EXAMPLE_ROWS = 25

_REQUEST = ("row", "prompt", "subject", "target_new")
_RESULT = (
    *(*_REQUEST, "status", "steps", "loss", "before_answer", "after_answer"),
    *("after_efficacy", "after_generalization", "after_specificity", "after_efficacy_strict"),
)
_RUN: dict[str, Any] = {"stages": [], "layers": [], "events": [], "versions": {}, "digests": {}}
_Record = dict[str, Any]


def write_report(store: Store) -> None:
    """Write ``report.html`` into a run folder, from what the folder holds.

    A run that has not come to its end has a report of what there is.

    Raises:
        RunFolderError: there is no ``run.json``.
        StorageError: a file cannot be read or written.
    """
    if not store.exists("run.json"):
        raise RunFolderError(f"{store.url} is not a run folder: it has no run.json; check the path")
    run = _RUN | store.read_json("run.json")
    metrics = store.read_json("metrics.json") if store.exists("metrics.json") else {}
    job = store.read_bytes("job.yaml").decode() if store.exists("job.yaml") else ""
    counts = metrics.get("counts") or run.get("counts") or {}
    results = _records(store, "results.parquet", _RESULT)
    rejected = _records(store, "rejected.parquet", (*_REQUEST, "reason"))
    text = page("report.html.j2").render(
        folder=store.url,
        job=job,
        run=run,
        counts=counts,
        known=metrics.get("known") or {},
        verdict=_verdict(run, metrics.get("gates", []), counts),
        gates=metrics.get("gates", []),
        seconds=_elapsed(run),
        before=metrics.get("before", {}),
        after=metrics.get("after", {}),
        fractions=FRACTIONS,
        layers=_layers(run),
        worst=_worst(filter(_is_edited, results)),
        examples=_spread(r for r in results if _is_edited(r) and r["after_answer"] is not None),
        lost=Cut([r for r in results if not _is_edited(r) and r["after_efficacy_strict"] == 0]),
        failed=Cut([r for r in results if r["status"] == "failed"]),
        rejected=Cut(rejected),
        events=Cut(run["events"]),
        charts=_charts(run, metrics, results),
    )
    store.write_bytes("report.html", text.encode(errors="backslashreplace"))


def _records(store: Store, name: str, columns: Sequence[str]) -> list[_Record]:
    """The rows of a table with these columns; what the table lacks is None."""
    if not store.exists(name):
        return []
    table = store.read_table(name)
    found = [_values(table, column) for column in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*found, strict=True)]


def _values(table: pa.Table, column: str) -> list[Any]:
    if column not in table.column_names:
        return [None] * len(table)
    values: list[Any] = table.column(column).to_pylist()
    return values


def _is_edited(result: _Record) -> bool:
    return bool(result["status"] != "known")


def _verdict(
    run: Mapping[str, Any], gates: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]
) -> dict[str, str]:
    """The first thing to know: a kind for its colour, a headline and a sentence."""
    status = run.get("status")
    if status == "complete" and gates:
        return {"kind": "good", "title": "Promoted", "text": "Every gate was passed."}
    if status == "complete" and counts.get("known") and not counts.get("edited"):
        text = "Every request was known already: nothing was edited, the model is the base's."
        return {"kind": "good", "title": "Nothing to edit", "text": text}
    if status == "complete":
        return {"kind": "good", "title": "Complete", "text": "The job asked for no gates."}
    if status == "held":
        names = ", ".join(str(gate["metric"]) for gate in gates if not gate["passed"])
        text = f"Held back by: {names}. Do not put this model to use."
        return {"kind": "bad", "title": "Held", "text": text}
    if status == "failed":
        text = str(run.get("error") or "No reason was recorded.")
        return {"kind": "bad", "title": "Failed", "text": text}
    return {"kind": "open", "title": "Not finished", "text": "This is what there is so far."}


def _elapsed(run: Mapping[str, Any]) -> float | None:
    """Seconds from start to end, where both were recorded."""
    try:
        start, end = (datetime.fromisoformat(run[f"{when}_at"]) for when in ("started", "finished"))
        return (end - start).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def _layers(run: Mapping[str, Any]) -> list[_Record]:
    layers = []
    for index, layer in enumerate(run["layers"]):
        number = re.search(r"\.(\d+)\.", str(layer["parameter"]))
        share = layer["delta_norm"] / layer["weight_norm"] if layer["weight_norm"] else 0.0
        name = number.group(1) if number else f"#{index + 1}"
        layers.append({**layer, "name": name, "share": share})
    return layers


def _worst(results: Iterable[_Record]) -> list[_Record]:
    """The measured requests that the edit served least, worst first."""
    served = []
    for record in results:
        figures = [v for k, v in record.items() if k.startswith("after_") and is_number(v)]
        if figures:
            served.append((sum(figures) / len(figures), -(record["loss"] or 0.0), record))
    served.sort(key=lambda item: item[:2])
    return [record for *_, record in served[:EXAMPLE_ROWS]]


def _spread(records: Iterable[_Record]) -> list[_Record]:
    """A few records from the whole length."""
    records = list(records)
    step = max(1, math.ceil(len(records) / EXAMPLE_ROWS))
    return records[::step]


def _charts(
    run: Mapping[str, Any], metrics: Mapping[str, Any], results: Sequence[_Record]
) -> dict[str, str]:
    """Inline SVG by name, where there is something to draw."""
    charts = dict.fromkeys(("scores", "steps", "losses", "layers"), "")
    before, after = metrics.get("before", {}), metrics.get("after", {})
    drawn = [n for n in FRACTIONS if is_number(before.get(n)) or is_number(after.get(n))]
    if drawn:
        gates = {gate["metric"]: gate["threshold"] for gate in metrics.get("gates", [])}
        charts["scores"] = score_chart(
            {name: before.get(name) for name in drawn},
            {name: after.get(name) for name in drawn},
            gates,
        )
    if steps := [r["steps"] for r in results if is_number(r["steps"])]:
        charts["steps"] = histogram(steps, "steps", "evaluations of the loss", whole=True)
    if losses := [r["loss"] for r in results if is_number(r["loss"])]:
        charts["losses"] = histogram(losses, "losses", "last loss (nats)")
    if layers := _layers(run):
        charts["layers"] = layer_chart([x["name"] for x in layers], [x["share"] for x in layers])
    return charts
