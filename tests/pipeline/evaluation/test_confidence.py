"""Intervals: wide for few measurements, with the stated coverage."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.confidence import (
    intervals,
    of_mean,
    of_paired,
    of_perplexity,
    of_shares,
)
from pmet.evaluation.figures import METRICS, summarize


def row(values: dict[str, tuple[float, int]], **others: float) -> dict[str, float | None]:
    figures: dict[str, float | None] = dict.fromkeys(METRICS)
    for metric, (value, prompts) in values.items():
        figures |= {metric: value, f"{metric}_prompts": prompts}
    return figures | others


def of_efficacy(hits: int, count: int) -> list[float]:
    rows = [row({"efficacy": (float(i < hits), 1)}) for i in range(count)]
    return intervals(rows)["efficacy"]


def test_one_prompt_a_request_is_wilsons_interval() -> None:
    # Wilson 1927 for 81 of 263 (Newcombe 1998, table I). The variance of a sample has n − 1.
    assert of_efficacy(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-4)
    assert of_efficacy(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-4)


def test_all_of_few_are_not_all_of_many() -> None:
    assert of_efficacy(20, 20) == pytest.approx([0.8389, 1.0], abs=1e-4)
    assert of_efficacy(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert of_efficacy(1, 1) == pytest.approx([0.2065, 1.0], abs=1e-4)
    assert of_efficacy(2000, 2000)[0] > 0.998
    # Two that differ count as one prompt: only half of the variance is known.
    assert of_efficacy(1, 2) == pytest.approx([0.0546, 0.9454], abs=1e-4)


def test_prompts_of_one_request_that_are_alike_count_as_one() -> None:
    alike = [row({"specificity": (float(i % 2), 10)}) for i in range(40)]
    mixed = [row({"specificity": (0.5, 10)}) for i in range(40)]
    single = [row({"specificity": (float(i % 2), 1)}) for i in range(40)]
    one, other = (intervals(r)["specificity"] for r in (alike, single))
    assert one == pytest.approx(other)
    low, high = intervals(mixed)["specificity"]
    assert low < 0.5 < high
    # All requests agree, so nothing is known about how prompts differ.
    assert high - low == pytest.approx(other[1] - other[0], rel=0.05)


def test_what_was_not_measured_has_none() -> None:
    rows = [row({"efficacy": (1.0, 1)})]
    assert set(intervals(rows)) == {"efficacy"}
    assert intervals([]) == {}
    assert of_shares([], []) is None
    assert of_perplexity([3.0, 0.0], [2, 0]) is None


@pytest.mark.parametrize("metric", ["specificity", "score", "fluency"])
def test_nineteen_of_twenty_intervals_hold_the_truth(metric: str) -> None:
    """With requests of different difficulty, intervals of new samples cover the true value."""
    generator = np.random.default_rng(0)

    def drawn(count: int) -> list[dict[str, float | None]]:
        rows = []
        for quality in generator.beta(2.0, 1.0, count):
            values = {
                kind: (generator.binomial(n, quality) / n, n)
                for kind, n in (("efficacy", 1), ("generalization", 2), ("specificity", 10))
            }
            rows.append(row(values, fluency=float(generator.normal(6.0, 0.5))))
        return rows

    truth = summarize(drawn(40_000))[metric]
    assert truth is not None
    inside = 0
    for _ in range(300):
        low, high = intervals(drawn(60))[metric]
        inside += low <= truth <= high
    # 285 of 300, and 13 either side is three and a half standard deviations.
    assert 272 <= inside <= 298


@pytest.mark.parametrize("count", [12, 40, 200])
def test_intervals_of_differences_hold_the_truth(count: int) -> None:
    """Of two models that agree on most documents, over new samples."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        base_E = draw.random(count) < 0.6
        lost_E, won_E = draw.random(count) < 0.15, draw.random(count) < 0.05
        edited_E = np.where(base_E, ~lost_E, won_E)
        low, high = of_paired(base_E, edited_E, fractions=True) or (0, 0)
        covered += low <= 0.4 * 0.05 - 0.6 * 0.15 <= high
    assert covered / 2000 >= 0.93


def test_few_documents_without_a_difference_do_not_exclude_one() -> None:
    same = [1.0, 0.0] * 6
    low, high = of_paired(same, same, fractions=True) or (0, 0)
    assert low == pytest.approx(-high)
    assert 0.1 < high < 0.2
    assert of_paired([1.0], [0.0], fractions=True) is None
    plain = of_paired([3.0, 5.0], [4.0, 7.0], fractions=False)
    assert plain == pytest.approx([0.807, 2.193], abs=1e-3)


def test_perplexity_is_where_all_texts_say_it_is() -> None:
    generator = np.random.default_rng(1)
    counts = generator.integers(5, 40, 200)
    nll = counts * generator.normal(2.0, 0.3, 200)
    low, high = of_perplexity(nll.tolist(), counts.tolist()) or [0.0, 0.0]
    assert low < np.exp(nll.sum() / counts.sum()) < high
    assert low < np.exp(2.0) < high
    assert high / low < 1.15
    assert of_perplexity([1e6, 2e6], [1, 1]) is None


def test_agreement_counts_places_by_text() -> None:
    low, high = of_shares([9, 0, 8], [10, 0, 10]) or [0.0, 0.0]
    assert low < 0.85 < high


def test_a_mean_is_within_two_standard_errors() -> None:
    # Standard deviation 1, so the standard error of four is a half.
    assert of_mean([-1.0, -1.0, 1.0, 1.0]) == pytest.approx([-1.1316, 1.1316], abs=1e-4)
    assert of_mean([3.0, 3.0]) == [3.0, 3.0]
    assert of_mean([3.0]) is None
