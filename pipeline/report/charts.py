"""Charts as inline SVG with the page's colours: readable on light and dark screens and on paper.

The SVG contains no scripts and loads nothing, and its text stays text. Elements drawn in ``INK``
become ``currentColor``, and each series becomes the CSS variable of its name (``--before``,
``--after``, ``--gate``). The charts' size does not grow with the number of requests.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Placeholders: matplotlib knows only fixed colours; the page's replace them.
INK, BEFORE, AFTER, GATE = "#010101", "#020202", "#030303", "#040404"
_CSS = {INK: "currentColor", BEFORE: "var(--before)", AFTER: "var(--after)", GATE: "var(--gate)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "text.color": INK,
    # A dollar sign in user text is literal, not mathematics.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
_BINS = 30
_MOST_NIGHTS_NAMED = 8
_NAME_LENGTH = 24
_LARGEST_DOT = 260.0
_SMALLEST_DOT = 12.0
_CELLS = 20

Values = Mapping[str, float | None]
Interval = tuple[float, float] | None
Line = list[tuple[int, float, Interval]]
"""Places, values and their intervals."""


def score_chart(
    before: Values,
    after: Values,
    gates: Mapping[str, float],
    *,
    intervals: Mapping[str, Mapping[str, Interval]] | None = None,
    labels: Mapping[str, str] | None = None,
    series: tuple[str, str] = ("before", "after"),
    axis: str = "prompts (%)",
) -> Markup:
    """Bars of fractions before and after, one pair per metric, with a line at each gate.

    Args:
        before: fractions by metric; None if not measured.
        after: the same for the edited model, with the same metrics.
        gates: positions of the gates' lines, by metric.
        intervals: confidence intervals by ``before`` and ``after`` and metric, drawn as whiskers.
        labels: labels of the metrics; a metric without one is labelled with its name.
        series: labels of the two bars of a pair.
        axis: label of the axis.
    """
    names, whiskers = list(after), intervals or {}
    called = {name: (labels or {}).get(name) or name.replace("_", " ") for name in names}

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        looks = (("before", before, -0.19, BEFORE), ("after", after, 0.19, AFTER))
        for (when, values, offset, colour), label in zip(looks, series, strict=True):
            widths = [_drawable(values[name]) or 0.0 for name in names]
            axes.barh(places + offset, widths, 0.34, color=colour, label=label)
            for place, name in enumerate(names):
                if (value := _drawable(values[name])) is not None:
                    interval = whiskers.get(when, {}).get(name)
                    if interval is not None:
                        low, high = interval
                        axes.hlines(place + offset, low, high, colors=INK, lw=1.0)
                    end = value if interval is None else max(value, interval[1])
                    start = _clear_of(gates.get(name), end) + 0.01
                    axes.text(start, place + offset, f"{value:.1%}", va="center", fontsize=8)
        asked = [(place, gates[name]) for place, name in enumerate(names) if name in gates]
        if asked:
            rows, thresholds = np.array([a[0] for a in asked]), [a[1] for a in asked]
            axes.vlines(thresholds, rows - 0.44, rows + 0.44, colors=GATE, lw=1.8, label="gate")
        axes.set_yticks(places, [called[name] for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(axis)
        axes.grid(axis="x")
        handles, titles = axes.get_legend_handles_labels()
        order = sorted(range(len(titles)), key=lambda i: titles[i] == "gate")
        named = [handles[i] for i in order], [titles[i] for i in order]
        axes.legend(*named, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _chart("scores", "Scores before and after", (7.2, 0.95 + 0.46 * len(names)), draw)


def _drawable(value: float | None) -> float | None:
    """A value that can be drawn on an axis; None for NaN and infinity too."""
    return value if value is not None and math.isfinite(value) else None


def _clear_of(gate: float | None, end: float, room: float = 0.09) -> float:
    """The start of a text after a bar, chosen so that the gate's line does not cross it."""
    return gate if gate is not None and end <= gate < end + room else end


def histogram(values: Sequence[float], name: str, label: str, *, whole: bool = False) -> Markup:
    """A histogram of requests by value; a few distinct ``whole`` values get one bar each."""
    data = np.asarray(values, dtype=np.float64)
    bins: int | list[float] = _BINS
    if whole and np.ptp(data) < 2 * _BINS:
        bins = (np.arange(data.min(), data.max() + 2) - 0.5).tolist()

    def draw(axes: Axes) -> None:
        axes.hist(data, bins=bins, color=AFTER, rwidth=0.88)
        if whole and np.ptp(data) < 2:
            # Room for whole numbers on the axis.
            axes.set_xlim(data.min() - 1.6, data.max() + 1.6)
        axes.set_xlabel(label)
        axes.set_ylabel("requests")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")

    return _chart(name, f"Requests by {label}", (4.8, 2.7), draw)


def layer_chart(names: Sequence[str], shares: Sequence[float]) -> Markup:
    """A chart of each layer's change relative to its weight (``shares``, fractions)."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        bars = axes.barh(places, np.asarray(shares) * 100, 0.6, color=AFTER)
        axes.bar_label(bars, [f"{share:.3%}" for share in shares], padding=3, fontsize=8)
        axes.set_yticks(places, [f"layer {name}" for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("‖Δ‖ / ‖W‖ (%)")
        axes.grid(axis="x")

    return _chart("layers", "Size of the change by layer", (7.2, 0.8 + 0.3 * len(names)), draw)


def group_chart(
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, str],
    *,
    series: tuple[str, str] = ("before", "after"),
) -> Markup:
    """A chart of groups of requests, one panel per metric: a mark before, one after.

    Args:
        rows: groups with ``name``, ``before`` and ``after`` (fractions by metric) and, where known,
            ``intervals`` (``before`` and ``after``, each with ends by metric).
        metrics: labels of the metrics drawn, by name.
        series: labels of the two marks.
    """
    places = np.arange(len(rows))

    def panel(axes: Axes, metric: str) -> None:
        ends = [[row[when].get(metric) for row in rows] for when in ("before", "after")]
        start, end = (np.array([np.nan if v is None else v for v in e]) for e in ends)
        axes.hlines(places, start, end, colors=BEFORE, lw=1.2)
        for place, row in enumerate(rows):
            interval = ((row.get("intervals") or {}).get("after") or {}).get(metric)
            if interval:
                low, high = interval
                axes.hlines(place, low, high, colors=AFTER, lw=4.5, alpha=0.3)
        axes.plot(start, places, "o", color=BEFORE, ms=4.5, label=series[0], clip_on=False)
        axes.plot(end, places, "o", color=AFTER, ms=5.5, label=series[1], clip_on=False)
        axes.set_title(metrics[metric], fontsize=9)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xticks([0, 0.5, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="both")

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            panel(axes, metric)
        panels[0].set_yticks(places, [_plain(row["name"]) for row in rows])
        panels[len(metrics) // 2].set_xlabel("prompts (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

    return _drawn("groups", "Figures by group", (7.2, 1.25 + 0.24 * len(rows)), draw)


def neighborhood_chart(before: Sequence[float], after: Sequence[float]) -> Markup:
    """Specificity of each request before and after: points below the diagonal got worse.

    Requests at the same point share a dot, whose area grows with their number.

    Args:
        before: for each request, the fraction of neighbors answered correctly.
        after: the same after the edit.
    """
    cells = np.rint(np.array([before, after]).T * _CELLS).astype(int)
    counts = Counter(map(tuple, cells.tolist()))
    most = max(counts.values())
    # Small dots are drawn last, above the large ones.
    dots = sorted(counts.items(), key=lambda item: -item[1])

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls="--", alpha=0.5)
        axes.text(0.3, 0.33, "unchanged", rotation=45, rotation_mode="anchor", fontsize=8)
        for worse in (False, True):
            chosen = [(cell, count) for cell, count in dots if (cell[1] < cell[0]) is worse]
            if chosen:
                spots = np.array([cell for cell, _ in chosen]) / _CELLS
                sizes = [_SMALLEST_DOT + _LARGEST_DOT * count / most for _, count in chosen]
                colour = GATE if worse else AFTER
                label = "worse than before" if worse else "as before, or better"
                axes.scatter(
                    spots[:, 0], spots[:, 1], s=sizes, color=colour, alpha=0.75, label=label, lw=0
                )
        for axis, when in ((axes.xaxis, "before"), (axes.yaxis, "after")):
            axis.set_major_formatter(PercentFormatter(1.0))
            axis.set_label_text(f"neighbors right {when} (%)")
        axes.set_xlim(-0.06, 1.06)
        axes.set_ylim(-0.06, 1.06)
        axes.set_aspect("equal")
        axes.grid()
        largest = f"the largest dot: {most:,} request{'s' if most > 1 else ''}"
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
        legend = axes.legend(**place, title=largest, title_fontsize=8)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([40.0])

    return _chart("neighbors", "Specificity of each request before and after", (4.6, 4.7), draw)


def trend_chart(nights: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Markup:
    """Fractions night by night: up to three lines, with gaps where nothing was measured."""
    looks = zip(series.items(), (AFTER, GATE, BEFORE), ("o", "s", "^"), strict=False)

    def draw(axes: Axes) -> None:
        places = np.arange(len(nights))
        for (name, values), colour, marker in looks:
            heights = [np.nan if value is None else value for value in values]
            axes.plot(places, heights, color=colour, marker=marker, ms=4, lw=1.4, label=name)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("prompts (%)")
        shown = places[:: max(1, -(-len(nights) // _MOST_NIGHTS_NAMED))]
        axes.set_xticks(shown, [nights[place] for place in shown])
        axes.set_xlabel("night")
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _chart("trend", "Scores night by night", (7.2, 2.9), draw)


def trial_chart(rungs: Sequence[str], scores: Sequence[float], allowed: Sequence[bool]) -> Markup:
    """The score of each trial of a search, in their order, with a line between rungs."""

    def draw(axes: Axes) -> None:
        places = np.arange(1, len(rungs) + 1)
        for kept, colour, marker, label in (
            (True, AFTER, "o", "allowed"),
            (False, GATE, "x", "failed, or perplexity rises too much"),
        ):
            here = np.asarray(allowed, dtype=bool) == kept
            if here.any():
                heights = np.asarray(scores)[here]
                axes.scatter(places[here], heights, 22, color=colour, marker=marker, label=label)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        for place in np.arange(1, len(rungs))[np.asarray(rungs)[1:] != np.asarray(rungs)[:-1]]:
            axes.axvline(place + 0.5, color=INK, lw=0.6, alpha=0.4)
        first = {rung: place for place, rung in reversed(list(zip(places, rungs, strict=True)))}
        axes.set_xticks(list(first.values()), [_plain(rung) for rung in first], ha="left")
        axes.set_ylabel("score (%)")
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return _chart("trials", "Score of each trial", (7.2, 2.9), draw)


def line_chart(
    name: str,
    title: str,
    lines: Mapping[str, Line],
    label: str,
    *,
    axis: str = "layer",
    percent: bool = True,
    marked: Sequence[int] = (),
) -> Markup:
    """Up to three lines over layers, each with a band for its interval.

    Args:
        name: the chart's name, unique on its page.
        title: the chart in words.
        lines: places, values and intervals, by the line's label.
        label: label of the values.
        axis: label of the places.
        percent: whether values are fractions.
        marked: neighboring places with a grey ground.
    """
    looks = zip(lines.items(), (AFTER, GATE, BEFORE), ("o", "s", "^"), strict=False)

    def draw(axes: Axes) -> None:
        if marked:
            axes.axvspan(marked[0] - 0.5, marked[-1] + 0.5, color=BEFORE, alpha=0.2, lw=0)
        for (called, points), colour, marker in looks:
            places, values = [p for p, _, _ in points], [v for _, v, _ in points]
            ends = [(v, v) if between is None else between for _, v, between in points]
            low, high = ([end[i] for end in ends] for i in (0, 1))
            axes.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(places, values, color=colour, marker=marker, ms=4, lw=1.4, label=called)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _chart(name, title, (4.8, 3.0), draw)


def _plain(name: Any) -> str:
    """User text as a label: short, in one direction, without terminal control characters."""
    text = "".join("�" if unicodedata.category(c)[0] == "C" else c for c in str(name))
    return text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH - 1]}…"


def _chart(
    name: str, title: str, inches: tuple[float, float], draw: Callable[[Axes], None]
) -> Markup:
    return _drawn(name, title, inches, lambda figure: draw(figure.add_subplot()))


def _drawn(
    name: str, title: str, inches: tuple[float, float], draw: Callable[[Figure], None]
) -> Markup:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The page's fonts display the text, not matplotlib's.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return Markup(_inline(file.getvalue(), title))  # noqa: S704 (matplotlib escapes its text)


def _inline(svg: str, title: str) -> str:
    """Turn an SVG file into an element with the page's colours and ids that do not clash."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for placeholder, css in _CSS.items():
        svg = svg.replace(placeholder, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
