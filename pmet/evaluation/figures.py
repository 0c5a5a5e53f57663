"""The measured figures: their names, and how those of requests are combined into a model's.

docs/metrics.md explains each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

KINDS = ("efficacy", "generalization", "specificity", "portability")
"""The prompts of a request: its own, its paraphrases, its neighbors, consequences of the fact."""

METRICS = tuple(f"{kind}{form}" for form in ("", "_strict", "_accuracy") for kind in KINDS)
"""Fractions of prompts: probability form, strict form, and token accuracy."""

SAID = ("efficacy_said", "generalization_said", "chat_said")
"""Shares of prompts whose answer, in the model's own words, states the new target."""

AMISS = ("old_said", "run_on")
"""Shares of edited prompts whose answer states the true target, or does not end; better low."""

KEPT = ("locality", "locality_unrelated")
"""Shares of prompts that should not change whose answer is the base model's."""

ANSWERED = (*SAID, *AMISS, *KEPT)
"""Figures of answers in a model's own words."""

SCORED = ("efficacy", "generalization", "specificity")
"""The figures whose harmonic mean is the score."""

OF_TEXT = ("fluency", "consistency")
"""Figures of generated text: means over requests."""

OF_CORPUS = ("perplexity", "agreement")
"""Figures of held-out text."""

OF_REQUESTS = (*METRICS, *SAID, *AMISS, "locality", *OF_TEXT)
"""All figures of requests."""

Row = Mapping[str, float | None]


_PROMPTS = {
    **{name: f"{name.removesuffix('_said')}_prompts" for name in SAID},
    **dict.fromkeys(AMISS, "efficacy_prompts"),
    "locality": "specificity_prompts",
}


def prompts_of(metric: str) -> str:
    """The name of a request's count of prompts behind a figure."""
    if metric in _PROMPTS:
        return _PROMPTS[metric]
    return f"{metric.removesuffix('_strict').removesuffix('_accuracy')}_prompts"


def weights(rows: Sequence[Row], metric: str) -> list[float]:
    """The weight of each request's figure in the model's; 0 if it has none."""
    if metric in OF_TEXT:
        return [float(row.get(metric) is not None) for row in rows]
    of = prompts_of(metric)
    return [float(row.get(of) or 0) if row.get(metric) is not None else 0.0 for row in rows]


def total(values: Sequence[float]) -> float:
    """The sum, rounded once; infinite or NaN if a value is, or if it overflows a float."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        # A sum beyond the largest float, or infinities of both signs.
        return sum(values)


def summarize(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means over all prompts of per-request figures, and their score; of text, over requests."""
    figures: dict[str, float | None] = {}
    for metric in OF_REQUESTS:
        counts = weights(rows, metric)
        prompts = sum(counts)
        values = (row.get(metric) or 0.0 for row in rows)
        summed = total([v * count for v, count in zip(values, counts, strict=True) if count])
        figures[metric] = summed / prompts if prompts else None
    figures["score"] = harmonic_mean([figures[kind] for kind in SCORED])
    return figures


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """Harmonic mean; None if a value is missing, 0 if one is 0."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return None
    return len(known) / sum(1 / v for v in known) if all(known) else 0.0
