"""What an inspection shows: the table on the terminal, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.report import Line, line_chart, page

PARTS = {"hidden": "hidden state", "ffn": "FFN", "attention": "attention"}
REACHED = {
    "before": "before",
    "both": "both, optimised together",
    "ffn of both": "δ_f of these, without δ_a",
    "ffn": "δ_f, optimised alone",
    "attention": "δ_a, optimised alone",
}
"""The rows of the table of probabilities."""
MOST_NAMED = 3
"""Windows that a recommendation names beside its own."""


def named(layers: Sequence[int]) -> str:
    """Neighboring layers in words."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]} to {layers[-1]}"


def show_inspected(record: Mapping[str, Any], where: str, console: Console) -> None:
    """Print the effects by layer, what the vectors reach, and the recommended layers."""
    facts = record["facts"]
    table = Table(
        "layer",
        *PARTS.values(),
        f"FFN from here, {record['width']} wide",
        title=f"Indirect effect, points of probability, on {facts['inspected']} facts",
    )
    for row in by_layer(record):
        cells = [_points(row[part]) for part in (*PARTS, "window")]
        style = "bold" if row["recommended"] else None
        table.add_row(str(row["layer"]), *cells, style=style)
    console.print(table)
    reached = record["optimisation"]["probability"]
    said = ", ".join(
        f"{label} {100 * reached[name]['mean']:.1f} %"
        for name, label in REACHED.items()
        if name in reached
    )
    console.print(f"probability of the new object: {said}", soft_wrap=True)
    for text in (asides(record), recommendation(record)):
        console.print(text, markup=False, soft_wrap=True)
    console.print(
        "pmet tune tries these and other layers by edits, with all other hyper-parameters"
    )
    console.print(where, markup=False, soft_wrap=True)


def asides(record: Mapping[str, Any]) -> str:
    """How many facts the figures rest on, and how many they do not."""
    facts = record["facts"]
    return (
        f"{facts['inspected']} facts that the model knows; left out: {facts['not_known']} whose "
        f"target_true is not its answer, and {facts['set_aside']} rows that cannot be inspected"
    )


def recommendation(record: Mapping[str, Any]) -> str:
    """The layers to edit, and how sure that is."""
    window = record["window"]
    close = [named(other["layers"]) for other in window["others"] if not other["certain"]]
    text = (
        f"Edit {named(window['layers'])}: restoring their FFN outputs brings "
        f"{100 * window['mean']:.1f} points of the true object's probability back"
    )
    if not _certain(window["interval"]):
        return f"{text}, which may be chance; give more facts that the model knows"
    if len(close) > MOST_NAMED:
        return f"{text}; not shown to be better than {len(close)} of the other windows"
    if close:
        return f"{text}; not shown to be better than {', '.join(close)}"
    return f"{text}, more than any other window"


def _certain(interval: Sequence[float] | None) -> bool:
    """Whether an effect is above zero."""
    return interval is not None and interval[0] > 0


def by_layer(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each layer, the effects of its parts and of the FFN window that begins with it."""
    found: dict[tuple[str, tuple[int, ...]], Any] = {
        (state["part"], tuple(state["layers"])): state for state in record["tracing"]["states"]
    }
    width, layers = record["width"], record["window"]["layers"]
    return [
        {
            "layer": layer,
            "recommended": layer in layers,
            **{part: found.get((part, (layer,))) for part in PARTS},
            "window": found.get(("ffn", tuple(range(layer, layer + width)))),
        }
        for layer in range(record["depth"])
    ]


def _points(effect: Mapping[str, Any] | None) -> str:
    return "" if effect is None else points(effect["mean"])


def points(effect: float) -> str:
    """A difference of probabilities in points; what rounds to zero has no sign."""
    text = f"{100 * effect:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def write_page(record: Mapping[str, Any]) -> str:
    """The page of an inspection, as HTML."""
    found = record["window"]
    window = found["layers"]
    states, moved = record["tracing"]["states"], record["optimisation"]["moved"]
    windows = [s for s in states if len(s["layers"]) == record["width"] > 1]
    charts = {
        "states": line_chart(
            "states",
            "Indirect effect of each layer",
            _lines(s for s in states if len(s["layers"]) == 1),
            "indirect effect",
            marked=window,
        ),
        "windows": windows
        and line_chart(
            "windows",
            f"Indirect effect of {record['width']} layers together",
            _lines(windows),
            "indirect effect",
            axis=f"first of {record['width']} layers",
            marked=window[:1],
        ),
        "moved": moved and _moved(moved, "moved", "‖after − before‖ / ‖before‖"),
        "similarity": moved and _moved(moved, "similarity", "cosine"),
    }
    return page("inspect.html.j2", "jobs").render(
        record=record,
        rows=by_layer(record),
        parts=PARTS,
        reached=REACHED,
        charts=charts,
        recommendation=recommendation(record),
        asides=asides(record),
        sure=_certain(found["interval"]) and all(other["certain"] for other in found["others"]),
        points=points,
    )


def _lines(states: Any) -> dict[str, Line]:
    """The effects of states by part, at their first layer."""
    lines: dict[str, Line] = {}
    for state in states:
        line = lines.setdefault(PARTS[state["part"]], [])
        line.append((state["layers"][0], state["mean"], state["interval"]))
    return lines


def _moved(moved: Sequence[Mapping[str, Any]], name: str, label: str) -> Any:
    lines = {
        PARTS[part]: [
            (row["layer"], row[part][name]["mean"], row[part][name]["interval"])
            for row in moved
            if part in row
        ]
        for part in ("ffn", "attention")
    }
    return line_chart(name, f"{label} by layer", lines, label, percent=False)
