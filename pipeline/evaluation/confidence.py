"""95 % intervals: how far figures may be off because of the limited number of requests.

Prompts of one request are similar, so requests, not prompts, are treated as independent. The
variance of a figure is that of a ratio of sums over requests (Cochran 1977, section 6.5). A
fraction's interval is Wilson's (1927) for the number of independent prompts that would give this
variance (Kish's effective sample size); if all requests agree, each counts as one prompt.
So a figure of 100 % on few requests has a wide interval, not an empty one.

Shape letters: E requests (or texts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pmet.evaluation import AMISS, METRICS, SAID, SCORED, Row, harmonic_mean, weights

Z = 1.959964
"""Standard deviations on either side of a normal mean that contain 95 %."""

RESAMPLES = 2000
"""How often requests are drawn again for the interval of a difference."""

Interval = list[float]


def intervals(rows: Sequence[Row]) -> dict[str, Interval]:
    """The interval of each figure that these requests have; that of fluency is in bits."""
    found: dict[str, Interval] = {}
    shares: dict[str, _Mean] = {}
    for metric in (*METRICS, *SAID, *AMISS, "locality", "consistency"):
        if mean := _mean_of(rows, metric):
            shares[metric] = mean
            found[metric] = mean.wilson()
    if all(kind in shares for kind in SCORED):
        found["score"] = _score([shares[kind] for kind in SCORED]).wilson()
    if (mean := _mean_of(rows, "fluency")) and mean.count > 1:
        found["fluency"] = mean.normal()
    return found


def of_shares(hits: Sequence[float], counts: Sequence[float]) -> Interval | None:
    """The interval of a fraction over texts, from the hits and the positions in each text."""
    if not sum(counts):
        return None
    values = [hit / count if count else 0.0 for hit, count in zip(hits, counts, strict=True)]
    return _Mean.of(np.array(values), np.array(counts, float)).wilson()


def of_mean(values: Sequence[float]) -> Interval | None:
    """The interval of a mean over requests, of any quantity; None for fewer than two."""
    if len(values) < 2:
        return None
    return _Mean.of(np.array(values, float), np.ones(len(values))).normal()


def of_perplexity(nll: Sequence[float], counts: Sequence[float]) -> Interval | None:
    """The interval of exp(Σ nll / Σ count) over texts."""
    known = [(total / count, count) for total, count in zip(nll, counts, strict=True) if count]
    if len(known) < 2:
        return None
    values, weights_E = (np.array(column, float) for column in zip(*known, strict=True))
    low, high = _Mean.of(values, weights_E).normal()
    largest = math.log(np.finfo(np.float64).max)
    if not math.isfinite(low + high) or high >= largest:
        return None
    return [math.exp(low), math.exp(high)]


class _Mean:
    """A mean, with each request's contribution to its error.

    Args:
        value: the mean.
        influence_E: how far each request moves the mean.
        count: number of contributing requests.
        most: number of prompts, the upper bound of the effective sample size.
    """

    def __init__(self, value: float, influence_E: np.ndarray, count: int, most: float) -> None:
        self.value, self.influence_E, self.count, self.most = value, influence_E, count, most

    @classmethod
    def of(cls, values_E: np.ndarray, weights_E: np.ndarray) -> _Mean:
        total = weights_E.sum()
        value = float((values_E * weights_E).sum() / total)
        influence_E = weights_E * (values_E - value) / total
        return cls(value, influence_E, int((weights_E > 0).sum()), float(total))

    @property
    def variance(self) -> float:
        if self.count < 2:
            return 0.0
        return float((self.influence_E**2).sum() * self.count / (self.count - 1))

    def wilson(self) -> Interval:
        p, variance = self.value, self.variance
        n = float(self.count)
        # Rounding leaves a variance of some 1e-34 where the true one is zero.
        if variance > 1e-20 and 0 < p < 1:
            n = min(self.most, max(1.0, p * (1 - p) / variance))
        middle = p + Z**2 / (2 * n)
        off = Z * math.sqrt(max(0.0, p * (1 - p)) / n + Z**2 / (4 * n**2))
        low, high = ((middle + sign * off) / (1 + Z**2 / n) for sign in (-1, 1))
        return [max(0.0, min(low, p)), min(1.0, max(high, p))]

    def normal(self) -> Interval:
        off = Z * math.sqrt(self.variance)
        return [self.value - off, self.value + off]


def _mean_of(rows: Sequence[Row], metric: str) -> _Mean | None:
    counts_E = np.array(weights(rows, metric), float)
    if not counts_E.sum():
        return None
    values_E = np.array([row.get(metric) or 0.0 for row in rows], float)
    return _Mean.of(values_E, counts_E)


def _score(parts: Sequence[_Mean]) -> _Mean:
    """The harmonic mean, with its parts' influences propagated to it (the delta method)."""
    value = harmonic_mean([part.value for part in parts]) or 0.0
    count = max(part.count for part in parts)
    influence_E = np.zeros_like(parts[0].influence_E)
    for part in parts:
        if part.value:
            influence_E = influence_E + part.influence_E * value**2 / (len(parts) * part.value**2)
    return _Mean(value, influence_E, count, sum(part.most for part in parts))


def of_difference(
    count: int, own: Callable[[np.ndarray], float], other: Callable[[np.ndarray], float]
) -> tuple[float, float]:
    """The interval of the difference of two scores on the same requests, by resampling them.

    Args:
        count: E.
        own: gives one score of the requests with these numbers, some of them repeated.
        other: gives the other.
    """
    draw = np.random.default_rng(0)
    drawn = (draw.integers(count, size=count) for _ in range(RESAMPLES))
    low, high = np.percentile([own(these) - other(these) for these in drawn], [2.5, 97.5])
    return float(low), float(high)


def of_paired(
    base: Sequence[float], edited: Sequence[float], *, fractions: bool
) -> Interval | None:
    """The interval of the mean of edited − base, both measured on the same documents.

    For fractions, one document without a difference and half a document in either direction are
    added (Agresti and Min 2005), so that few documents that all agree give a wide interval.

    Args:
        base: values of one model.
        edited: values of the other, in the same order.
        fractions: whether values are from 0 to 1.
    """
    differences_E = np.asarray(edited, float) - np.asarray(base, float)
    if len(differences_E) < 2 or not np.isfinite(differences_E).all():
        return None
    counts_E = np.ones(len(differences_E))
    if fractions:
        differences_E = np.concatenate([differences_E, [1.0, -1.0, 0.0]])
        counts_E = np.concatenate([counts_E, [0.5, 0.5, 1.0]])
    mean = float(np.average(differences_E, weights=counts_E))
    variance = float(np.average((differences_E - mean) ** 2, weights=counts_E))
    off = Z * math.sqrt(variance / counts_E.sum())
    return [mean - off, mean + off]


def rounded(found: Mapping[str, Interval], digits: int = 6) -> dict[str, Interval]:
    """Intervals rounded for files."""
    return {name: [round(low, digits), round(high, digits)] for name, (low, high) in found.items()}
