"""Aggregation of requests' figures into a model's."""

from __future__ import annotations

from typing import Any

import pytest

from pmet.evaluation.figures import METRICS, harmonic_mean, summarize


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.0, 0.5], 0.75),
        ([0.5, 0.0, 1.0], 0.0),
        ([0.5, None, 1.0], None),
        ([], None),
    ],
)
def test_the_score_is_the_harmonic_mean(values: list[Any], expected: float | None) -> None:
    assert harmonic_mean(values) == (None if expected is None else pytest.approx(expected))


def test_a_prompt_counts_once_and_a_text_by_its_request() -> None:
    one = dict.fromkeys(METRICS) | {"portability": 1.0, "portability_prompts": 1, "fluency": 6.0}
    other = dict.fromkeys(METRICS) | {"portability": 0.0, "portability_prompts": 3, "fluency": 5.0}
    figures = summarize([one, other, dict.fromkeys(METRICS)])
    assert figures["portability"] == 0.25
    assert figures["fluency"] == 5.5
    assert figures["consistency"] is None
    assert figures["score"] is None
