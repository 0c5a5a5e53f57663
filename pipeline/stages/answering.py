"""Which requests a model answers in its own words: as many as the other figures' time allows.

Generating an answer takes as long as reading many prompts. Beyond a number that gives narrow
intervals, no more requests are drawn than take about as long as everything else that is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from pipeline.stages.measurement_work import work_of_answers, work_of_scores
from pmet.request import EditRequest

FEWEST = 200
"""Requests that are always asked, if there are as many."""
_COUNTED = 500


def answering(
    count: int,
    request_at: Callable[[int], EditRequest],
    wanted: int | Literal["auto"],
    texts: int,
    seed: int,
) -> frozenset[int]:
    """The numbers of the requests that a model answers in its own words.

    Args:
        count: how many requests are measured.
        request_at: returns the one with a number.
        wanted: how many to answer, or ``auto``.
        texts: work of the held-out texts, in estimated tokens.
        seed: seed of the draw.
    """
    if wanted != "auto":
        number = wanted
    elif count > FEWEST:
        number = max(FEWEST, _affordable(count, request_at, texts))
    else:
        number = count
    if number >= count:
        return frozenset(range(count))
    return frozenset(random.Random(seed).sample(range(count), number))


def _affordable(count: int, request_at: Callable[[int], EditRequest], texts: int) -> int:
    """The number of answered requests whose work is that of all other figures."""
    some = [request_at(i) for i in range(0, count, -(-count // _COUNTED))]
    answers, scores = (work(some) / len(some) for work in (work_of_answers, work_of_scores))
    return int((scores * count + texts) / answers)
