"""Scores of tasks, on one model and compared between two, with intervals paired over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation import of_paired, of_shares


@dataclass(frozen=True)
class TaskScores:
    """What a model reached in a task, or in a group of them.

    Attributes:
        name: of the task.
        metric: its main metric.
        higher_is_better: whether that is so for this metric.
        value: the main metric.
        values: of each document, if the metric is their mean; else None.
        documents: number of documents.
        num_fewshot: examples in front of each question.
        metrics: all metrics of the task, by name; for a group, the main one.
    """

    name: str
    metric: str
    higher_is_better: bool
    value: float
    values: list[float] | None
    documents: int
    num_fewshot: int
    metrics: dict[str, float]

    @property
    def is_fraction(self) -> bool:
        """Whether the metric is a mean of values from 0 to 1, of which more is better.

        A ruined model's may be undefined, and must not be left out of the mean over tasks.
        """
        inside = [0 <= value <= 1 or math.isnan(value) for value in self.values or ()]
        return self.higher_is_better and bool(inside) and all(inside)

    @classmethod
    def joined(cls, name: str, scores: Sequence[TaskScores]) -> TaskScores | None:
        """The scores of several tasks as one, over all documents; None if they differ in kind."""
        first = scores[0]
        values = [value for own in scores for value in own.values or ()]
        alike = {(own.metric, own.num_fewshot, own.higher_is_better) for own in scores}
        if len(alike) > 1 or any(own.values is None for own in scores):
            return None
        value = sum(values) / len(values)
        return cls(
            name=name,
            metric=first.metric,
            higher_is_better=first.higher_is_better,
            value=value,
            values=values,
            documents=sum(own.documents for own in scores),
            num_fewshot=first.num_fewshot,
            metrics={first.metric: value},
        )

    def as_json(self) -> dict[str, Any]:
        """The scores as JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskScores:
        """Read scores."""
        return cls(**values)


def mean_of(scores: Sequence[TaskScores]) -> float | None:
    """The mean over the tasks whose main metric is a fraction; None without any."""
    values = [own.value for own in scores if own.is_fraction]
    return sum(values) / len(values) if values else None


def interval_of_mean(scores: Sequence[TaskScores]) -> list[float] | None:
    """The 95 % interval of `mean_of`; each task counts the same, whatever its size."""
    shown = [own.values for own in scores if own.is_fraction and own.values]
    if any(math.isnan(value) for values in shown for value in values):
        return None
    every = sum(map(len, shown))
    counts = [every / (len(shown) * len(values)) for values in shown for _ in values]
    hits = [v * c for v, c in zip((v for values in shown for v in values), counts, strict=True)]
    return of_shares(hits, counts)


def alone(scores: Sequence[TaskScores]) -> list[dict[str, Any]]:
    """One model's scores of each task as JSON values, with the 95 % interval of fractions."""
    return [
        {
            "name": own.name,
            "metric": own.metric,
            "higher_is_better": own.higher_is_better,
            "documents": own.documents,
            "num_fewshot": own.num_fewshot,
            "after": own.value,
            "interval": interval_of_mean([own]),
            "metrics": {"after": own.metrics},
        }
        for own in scores
    ]


def compared(before: Sequence[TaskScores], after: Sequence[TaskScores]) -> list[dict[str, Any]]:
    """Both models' scores of each task as JSON values, with their difference.

    Returns:
        For each task ``name``, ``metric``, ``higher_is_better``, ``documents``, ``num_fewshot``,
        ``before``, ``after``, ``difference`` (after − before), ``interval`` (95 %, of the
        difference, paired over documents; None if the metric is no mean over them), ``drop`` (how
        much worse the edited model is) and ``metrics`` (all metrics, before and after).
    """
    return [_compared(base, edited) for base, edited in zip(before, after, strict=True)]


def _compared(base: TaskScores, edited: TaskScores) -> dict[str, Any]:
    paired = None
    if base.values and edited.values and len(base.values) == len(edited.values):
        paired = of_paired(base.values, edited.values, fractions=_fractions(base, edited))
    return {
        "name": base.name,
        "metric": base.metric,
        "higher_is_better": base.higher_is_better,
        "documents": base.documents,
        "num_fewshot": base.num_fewshot,
        "before": base.value,
        "after": edited.value,
        "difference": edited.value - base.value,
        "interval": paired and [round(end, 6) for end in paired],
        "drop": _drop(base, edited),
        "metrics": {"before": base.metrics, "after": edited.metrics},
    }


def _fractions(*scores: TaskScores) -> bool:
    return all(own.is_fraction for own in scores)


def _drop(base: TaskScores, edited: TaskScores) -> float | None:
    """How much worse the edited model is: absolute for fractions, else relative to the base."""
    if not math.isfinite(base.value) or not math.isfinite(edited.value):
        return None
    if _fractions(base, edited):
        return base.value - edited.value
    worse = base.value - edited.value if base.higher_is_better else edited.value - base.value
    return worse / abs(base.value) if base.value else None


def largest_drop(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest drop of any task; None if one is undefined, which may be anything."""
    drops = [row["drop"] for row in rows]
    return None if not drops or None in drops else max(drops)
