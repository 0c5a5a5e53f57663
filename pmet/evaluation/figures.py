"""The figures that are measured: their names, and how those of requests become a model's.

What each of them means is said in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

KINDS = ("efficacy", "generalization", "specificity", "portability")
"""What a request is asked: its own prompt, its paraphrases, its neighbors, what follows from it."""

METRICS = tuple(f"{kind}{form}" for form in ("", "_strict", "_accuracy") for kind in KINDS)
"""Fractions of prompts: probability form, strict form, and token accuracy."""

SCORED = ("efficacy", "generalization", "specificity")
"""What the score is the harmonic mean of."""

OF_TEXT = ("fluency", "consistency")
"""Figures of generated text: means over requests."""

OF_CORPUS = ("perplexity", "agreement")
"""Figures of held-out text."""

Row = Mapping[str, float | None]


def prompts_of(metric: str) -> str:
    """The name under which a request has the number of prompts that a figure is a mean over."""
    return f"{metric.removesuffix('_strict').removesuffix('_accuracy')}_prompts"


def weights(rows: Sequence[Row], metric: str) -> list[float]:
    """How much each request's figure counts in the model's; 0 where it has none."""
    if metric in OF_TEXT:
        return [float(row.get(metric) is not None) for row in rows]
    of = prompts_of(metric)
    return [float(row.get(of) or 0) if row.get(metric) is not None else 0.0 for row in rows]


def total(values: Sequence[float]) -> float:
    """The sum, rounded once; infinite or NaN where values are, or where it exceeds a float."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        # A sum beyond the largest float, or infinities of both signs.
        return sum(values)


def summarize(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means over all prompts of per-request figures, and their score; of text, over requests."""
    figures: dict[str, float | None] = {}
    for metric in (*METRICS, *OF_TEXT):
        counts = weights(rows, metric)
        prompts = sum(counts)
        values = (row.get(metric) or 0.0 for row in rows)
        summed = total([v * count for v, count in zip(values, counts, strict=True) if count])
        figures[metric] = summed / prompts if prompts else None
    figures["score"] = harmonic_mean([figures[kind] for kind in SCORED])
    return figures


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """Harmonic mean; None where a value is missing, 0 where one is 0."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return None
    return len(known) / sum(1 / v for v in known) if all(known) else 0.0
