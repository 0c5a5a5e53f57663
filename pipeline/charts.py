"""Charts as inline SVG that takes its colours from the page: readable on light, dark and paper.

The SVG holds no scripts and loads nothing. Its text stays text; everything drawn in ``INK``
becomes ``currentColor``, and each series the CSS variable of its name (``--before``, ``--after``,
``--gate``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Placeholders: matplotlib only knows fixed colours, the page replaces them.
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


def score_chart(
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    gates: Mapping[str, float],
) -> Markup:
    """Bars of fractions before and after, by metric, with a mark where a gate stands."""
    names = [n for n in after if before.get(n) is not None or after.get(n) is not None]
    with _drawn("scores", "Scores before and after", 0.9 + 0.45 * len(names)) as (figure, axes):
        places = np.arange(len(names))
        for offset, values, colour, label in (
            (-0.19, before, BEFORE, "before"),
            (0.19, after, AFTER, "after"),
        ):
            widths = [values.get(name) or 0.0 for name in names]
            bars = axes.barh(places + offset, widths, 0.34, color=colour, label=label)
            texts = [_percent(values.get(name)) for name in names]
            axes.bar_label(bars, texts, padding=3, fontsize=8)
        for place, name in enumerate(names):
            if name in gates:
                line = axes.vlines(gates[name], place - 0.42, place + 0.42, colors=GATE, lw=1.6)
                line.set_label("gate" if name == next(iter(gates)) else None)
        axes.set_yticks(places, [name.replace("_strict", " (strict)") for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.08)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("prompts (%)")
        axes.grid(axis="x")
        figure.legend(loc="outside upper right", ncols=3)
    return figure.markup


def histogram(values: Sequence[float], name: str, label: str, *, whole: bool = False) -> Markup:
    """How many requests have which value; ``whole`` values have a bar each where they are few."""
    data = np.asarray(values, dtype=np.float64)
    bins: int | np.ndarray = _BINS
    if whole and np.ptp(data) < 2 * _BINS:
        bins = np.arange(data.min(), data.max() + 2) - 0.5
    with _drawn(name, f"Requests by {label}", 2.4, width=4.6) as (_figure, axes):
        axes.hist(data, bins=bins, color=AFTER, rwidth=0.88)
        axes.set_xlabel(label)
        axes.set_ylabel("requests")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
    return _figure.markup
