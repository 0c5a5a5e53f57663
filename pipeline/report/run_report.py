"""The report of a run: one self-contained HTML page.

Everything that comes from data is escaped, long texts and long tables are cut (with a note), and
the page blocks scripts and the network for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data import RejectionCode
from pipeline.evaluation import (
    ALWAYS,
    CHANGE_WARNED,
    CORE,
    LOSS_WARNED,
    ROUNDING_WARNED,
    all_numbers,
    changes_too_much,
    figure_of,
    is_astray,
    is_fraction,
    is_number,
    measured,
    read_gate,
    rounds_too_much,
    show_tasks,
)
from pipeline.events import EventKind
from pipeline.report.charts import (
    Interval,
    group_chart,
    histogram,
    layer_chart,
    neighborhood_chart,
    score_chart,
)
from pipeline.report.html import Cut, page
from pipeline.run_folder import (
    Row,
    RunRecord,
    event_counts,
    layers,
    read_run,
    show_rate,
    throughput,
)
from pipeline.storage import Store
from pmet.evaluation import ANSWERED, same

EXAMPLE_ROWS = 25
SHOWN_WARNINGS = 8
GROUPS_DRAWN = 24
_GROUPED = (*CORE, "portability")


def write_report(store: Store, *, quarantined: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write ``report.html`` into a run folder, from the folder's contents.

    The report of an unfinished run shows what exists so far.

    Args:
        store: the run folder.
        quarantined: facts excluded from the job because the model does not learn them,
            with ``relation``, ``subject``, ``object``, ``reason`` and ``since``.

    Raises:
        RunFolderError: there is no ``run.json``.
        StorageError: a file cannot be read or written.
    """
    record = read_run(store)
    text = page("report.html.j2").render(
        **_told(record), **_requests(record), quarantined=Cut(quarantined)
    )
    store.write_bytes("report.html", text.encode(errors="backslashreplace"))


def _told(record: RunRecord) -> dict[str, Any]:
    """The page's values for the run as a whole."""
    last = record.metrics.get("last") or {}
    groups = groups_of(record)
    return {
        "folder": record.store.url,
        "job": record.job,
        "run": record.run,
        "counts": record.counts,
        "known": record.metrics.get("known") or {},
        "verdict": verdict(record),
        "gates": [read_gate(gate) for gate in record.gates],
        "seconds": record.seconds(),
        "attempts": record.attempts(),
        "before": record.before,
        "after": record.after,
        "last": last.get("after") or {},
        "last_run": last.get("run"),
        "figures": measured(record.before, record.after, always=ALWAYS),
        "interval": record.interval,
        "has_intervals": bool(record.metrics.get("intervals")),
        "grouped_by": (record.metrics.get("groups") or {}).get("column"),
        "harness": show_tasks(record.metrics),
        "harness_version": (record.metrics.get("harness") or {}).get("version"),
        "groups": Cut(groups),
        "group_figures": group_figures(groups),
        "groups_drawn": min(len(groups), GROUPS_DRAWN),
        "layers": layers(record.run),
        "change_warned": CHANGE_WARNED,
        "rounding_warned": ROUNDING_WARNED,
        "changes_too_much": changes_too_much,
        "rounds_too_much": rounds_too_much,
        "rates": _rates(record),
        "events": Cut(record.run["events"]),
        "event_counts": event_counts(record.run["events"]),
        "warnings": Cut(_warnings(record), SHOWN_WARNINGS),
        "charts": _charts(record, groups),
    }


def _warnings(record: RunRecord) -> list[str]:
    """The run's warnings, each sentence once."""
    warned = (event for event in record.run["events"] if event["kind"] == EventKind.WARNING)
    return list(dict.fromkeys(str(event["text"]) for event in warned))


def _requests(record: RunRecord) -> dict[str, Any]:
    """The page's values for single requests."""
    edited = record.edited()
    neighbors = _with_neighbors(edited)
    damaged = [row for row in neighbors if _damage(row) > 0]
    damaged.sort(key=lambda row: (-_damage(row), row["row"]))
    astray = [row for row in edited if is_astray(row["first_loss"], row["loss"])]
    late = [row for row in record.rejected if row["code"] == RejectionCode.NO_TARGET]
    early = [row for row in record.rejected if row["code"] != RejectionCode.NO_TARGET]
    return {
        "worst": _worst(edited),
        "astray": Cut(
            sorted(astray, key=lambda row: row["first_loss"] - row["loss"]), EXAMPLE_ROWS
        ),
        "loss_warned": LOSS_WARNED,
        "examples": _spread([row for row in edited if row["after_answer"] is not None]),
        "chat": any(row["after_chat_answer"] is not None for row in edited),
        "changed": Cut(_changed_neighbors(edited), EXAMPLE_ROWS),
        "texts": _spread([row for row in edited if row["after_text"] is not None]),
        "neighbors": len(neighbors),
        "damaged": Cut(damaged, EXAMPLE_ROWS),
        "improved": sum(_damage(row) < 0 for row in neighbors),
        "lost": Cut(
            [
                row
                for row in record.results
                if row["status"] == "known" and row["after_efficacy_strict"] == 0
            ]
        ),
        "failed": Cut([row for row in record.results if row["status"] == "failed"]),
        "without_target": Cut(late),
        "rejected": Cut(early),
    }


def verdict(record: RunRecord) -> dict[str, str]:
    """The overall outcome: a kind for its colour, a headline and a sentence."""
    status, gates, counts = record.run["status"], record.gates, record.counts
    if status == "complete" and gates:
        return {"kind": "good", "title": "Promoted", "text": "Every gate was passed."}
    if status == "complete" and counts.get("known") and not counts.get("edited"):
        text = "Every request was known already: nothing was edited, and the model is the base's."
        return {"kind": "good", "title": "Nothing to edit", "text": text}
    if status == "complete":
        return {"kind": "good", "title": "Complete", "text": "The job asked for no gates."}
    if status == "held":
        names = ", ".join(read_gate(gate).name for gate in gates if not gate["passed"])
        text = f"Held back by: {names}. Do not put this model to use."
        return {"kind": "bad", "title": "Held", "text": text}
    if status == "failed":
        text = str(record.run.get("error") or "No reason was recorded.")
        return {"kind": "bad", "title": "Failed", "text": text}
    return {"kind": "open", "title": "Not finished", "text": "This is what there is so far."}


def _worst(results: Iterable[Row]) -> list[Row]:
    """The measured requests with the worst results, worst first."""
    served = []
    for row in results:
        figures = [value for name in ALWAYS if is_number(value := row.get(f"after_{name}"))]
        if figures:
            served.append((sum(figures) / len(figures), -(row["loss"] or 0.0), row))
    served.sort(key=lambda item: item[:2])
    return [row for *_, row in served[:EXAMPLE_ROWS]]


def _spread(rows: Sequence[Row]) -> list[Row]:
    """A few rows spread over the whole list."""
    step = max(1, math.ceil(len(rows) / EXAMPLE_ROWS))
    return list(rows[::step])


def _changed_neighbors(results: Iterable[Row]) -> list[dict[str, Any]]:
    """The neighborhood prompts that the edited model answers otherwise, with both answers."""
    return [
        {"row": row["row"], "prompt": prompt, "before": before, "after": after}
        for row in results
        for prompt, before, after in zip(
            # Prompts that are null or empty were not asked.
            [prompt for prompt in row["neighborhood_prompts"] or () if prompt and prompt.strip()],
            row["before_neighborhood_answers"] or (),
            row["after_neighborhood_answers"] or (),
            # Those that were not drawn have no answers.
            strict=False,
        )
        if not same(after, before)
    ]


def _with_neighbors(results: Iterable[Row]) -> list[Row]:
    """The requests whose neighbors were measured on both models."""
    return [
        row
        for row in results
        if is_number(row["before_specificity"]) and is_number(row["after_specificity"])
    ]


def _damage(row: Row) -> float:
    """The share of a request's neighbors that were correct before and are wrong now."""
    return float(row["before_specificity"] - row["after_specificity"])


def groups_of(record: RunRecord) -> list[dict[str, Any]]:
    """The groups of a run's requests with their figures; missing figures are empty."""
    rows = (record.metrics.get("groups") or {}).get("rows") or []
    return [{"before": {}, "after": {}, "intervals": {}} | dict(row) for row in rows]


def group_figures(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures that any group has, of those that tables and charts of groups show."""
    held = {name for group in groups for name, value in group["after"].items() if is_number(value)}
    return [name for name in _GROUPED if name in held]


def weakest_groups(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The groups with the lowest figures, as many as can be drawn, in the order given."""

    def served(group: Mapping[str, Any]) -> float:
        values = [group["after"][name] for name in names if is_number(group["after"].get(name))]
        return sum(values) / len(values) if values else math.inf

    chosen = sorted(groups, key=served)[:GROUPS_DRAWN]
    return [group for group in groups if group in chosen]


def _rates(record: RunRecord) -> list[str]:
    """The throughput of each stage; empty if unknown."""
    return [show_rate(throughput(stage, record)) for stage in record.run["stages"]]


def _charts(record: RunRecord, groups: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Inline SVG charts by name, for the data that exists."""
    kinds = ("said", "scores", "groups", "neighbors", "steps", "losses", "layers")
    charts = dict.fromkeys(kinds, "")
    before, after, results = record.before, record.after, record.results
    fractions = [f.name for f in measured(before, after) if is_fraction(f.name)]
    for chart in ("said", "scores"):
        drawn = [name for name in fractions if (name in ANSWERED) == (chart == "said")]
        if drawn:
            by_prompt = set(drawn) <= {*ALWAYS, *ANSWERED}
            charts[chart] = score_chart(
                {name: number(before.get(name)) for name in drawn},
                {name: number(after.get(name)) for name in drawn},
                {name: place for name, place in _gate_lines(record).items() if name in drawn},
                intervals=intervals_of(record, drawn),
                labels={name: figure_of(name).label for name in drawn},
                axis="prompts (%)" if by_prompt else "prompts, or tokens (%)",
            )
    if names := group_figures(groups):
        shown = weakest_groups(groups, names)
        charts["groups"] = group_chart(shown, {n: figure_of(n).label for n in names})
    if pairs := _with_neighbors(record.edited()):
        charts["neighbors"] = neighborhood_chart(
            [row["before_specificity"] for row in pairs],
            [row["after_specificity"] for row in pairs],
        )
    if steps := [row["steps"] for row in results if is_number(row["steps"])]:
        charts["steps"] = histogram(steps, "steps", "evaluations of the loss", whole=True)
    if losses := [row["loss"] for row in results if is_number(row["loss"])]:
        charts["losses"] = histogram(losses, "losses", "last loss (nats)")
    if edited := [layer for layer in layers(record.run) if is_number(layer["share"])]:
        charts["layers"] = layer_chart([x["name"] for x in edited], [x["share"] for x in edited])
    return charts


def number(value: Any) -> float | None:
    """A value that can be drawn, or None."""
    return float(value) if is_number(value) else None


def intervals_of(record: RunRecord, names: Iterable[str]) -> dict[str, dict[str, Interval]]:
    """The confidence intervals that exist, by ``before`` and ``after`` and figure."""
    found: dict[str, dict[str, Interval]] = {"before": {}, "after": {}}
    for when, of in found.items():
        for name in names:
            ends = record.interval(when, name)
            if ends and len(ends) == 2 and all_numbers(ends):
                of[name] = (float(ends[0]), float(ends[1]))
    return found


def _gate_lines(record: RunRecord) -> dict[str, float]:
    """The gates' positions on the axis of fractions, by figure; the highest of several."""
    last = (record.metrics.get("last") or {}).get("after") or {}
    lines: dict[str, float] = {}
    for gate in record.gates:
        text, threshold = read_gate(gate), gate["threshold"]
        name = text.figure
        start = {"least": 0.0, "drop": record.before.get(name), "drop_since_last": last.get(name)}
        origin = start.get(text.kind)
        if is_fraction(name) and is_number(origin):
            place = threshold if text.kind == "least" else origin - threshold
            lines[name] = max(place, lines.get(name, place))
    return lines
