"""Charts as inline SVG that takes its colours from the page: readable on light, dark and paper.

The SVG holds no scripts and loads nothing, and its text stays text. What is drawn in ``INK``
becomes ``currentColor``, and each series the CSS variable of its name (``--before``, ``--after``,
``--gate``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Placeholders: matplotlib only knows fixed colours, the page's are put in their place.
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
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
_BINS = 30
_MOST_NIGHTS_NAMED = 8


def score_chart(
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    gates: Mapping[str, float],
) -> Markup:
    """Bars of fractions before and after, one pair a metric, with a line where a gate stands."""
    names = list(after)

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        series = (("before", before, -0.19, BEFORE), ("after", after, 0.19, AFTER))
        for label, values, offset, colour in series:
            widths = [values[name] or 0.0 for name in names]
            axes.barh(places + offset, widths, 0.34, color=colour, label=label)
            for place, name in enumerate(names):
                if (value := values[name]) is not None:
                    start = _clear_of(gates.get(name), value) + 0.01
                    axes.text(start, place + offset, f"{value:.1%}", va="center", fontsize=8)
        asked = [(place, gates[name]) for place, name in enumerate(names) if name in gates]
        if asked:
            rows, thresholds = np.array([a[0] for a in asked]), [a[1] for a in asked]
            axes.vlines(thresholds, rows - 0.44, rows + 0.44, colors=GATE, lw=1.8, label="gate")
        axes.set_yticks(places, [name.replace("_strict", " (strict)") for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("prompts (%)")
        axes.grid(axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _chart("scores", "Scores before and after", (7.2, 0.95 + 0.46 * len(names)), draw)


def _clear_of(gate: float | None, end: float, room: float = 0.09) -> float:
    """Where a text after a bar begins, so that the gate's line does not cross it."""
    return gate if gate is not None and end <= gate < end + room else end


def histogram(values: Sequence[float], name: str, label: str, *, whole: bool = False) -> Markup:
    """How many requests have which value; ``whole`` values have a bar each where they are few."""
    data = np.asarray(values, dtype=np.float64)
    bins: int | list[float] = _BINS
    if whole and np.ptp(data) < 2 * _BINS:
        bins = (np.arange(data.min(), data.max() + 2) - 0.5).tolist()

    def draw(axes: Axes) -> None:
        axes.hist(data, bins=bins, color=AFTER, rwidth=0.88)
        axes.set_xlabel(label)
        axes.set_ylabel("requests")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")

    return _chart(name, f"Requests by {label}", (4.8, 2.7), draw)


def layer_chart(names: Sequence[str], shares: Sequence[float]) -> Markup:
    """The size of each layer's change relative to its weight (``shares``, fractions)."""

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


def trend_chart(nights: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Markup:
    """Fractions night by night: a line each, up to three; a gap where nothing was measured."""
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


def _chart(
    name: str, title: str, inches: tuple[float, float], draw: Callable[[Axes], None]
) -> Markup:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return Markup(_inline(file.getvalue(), title))  # noqa: S704 (matplotlib escapes its text)


def _inline(svg: str, title: str) -> str:
    """An SVG file as an element of a page, with the page's colours and no clashing ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for placeholder, css in _CSS.items():
        svg = svg.replace(placeholder, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
