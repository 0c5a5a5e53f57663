"""The questions of a request to a model, and its figures computed from the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pmet.evaluation.figures import METRICS
from pmet.evaluation.prompts import Continuation
from pmet.request import EditRequest

# Prompt, wanted answer, and the one that it is compared with.
_Question = tuple[str, str | None, str | None]

Score = tuple[float, bool, float]
"""Mean log-probability of a target, whether it is greedy, and the share of its tokens that are."""


def continuations_of(request: EditRequest) -> Iterator[Continuation]:
    """The prompts and targets whose scores a request's figures need."""
    for questions in _questions(request).values():
        for prompt, wanted, other in questions:
            if wanted is not None:
                yield continuation(request, prompt, wanted)
                if other is not None:
                    yield continuation(request, prompt, other)


def continuation(request: EditRequest, prompt: str, target: str) -> Continuation:
    """One of a request's prompts with a target, separated as the request says."""
    given = request.separator
    return (prompt, target) if given is None else (prompt, target, given)


def beginnings(request: EditRequest) -> Sequence[str]:
    """The beginnings that a model continues when it generates text for a request."""
    return request.generation_prompts or (request.text,)


def figures_of(request: EditRequest, scored: Mapping[Continuation, Score]) -> dict[str, Any]:
    """The figures of ``METRICS`` and the number of prompts that each is a mean over.

    Args:
        request: the request.
        scored: the scores of its continuations, and possibly others.
    """
    figures: dict[str, Any] = dict.fromkeys(METRICS)
    for kind, questions in _questions(request).items():
        figures[f"{kind}_prompts"] = len(questions)
        scores = [
            scored[continuation(request, prompt, wanted)]
            for prompt, wanted, _ in questions
            if wanted is not None
        ]
        if not scores:
            continue
        figures[f"{kind}_strict"] = _mean([greedy for _, greedy, _ in scores])
        figures[f"{kind}_accuracy"] = _mean([share for *_, share in scores])
        others = [
            scored[continuation(request, prompt, other)][0]
            for prompt, _, other in questions
            if other is not None
        ]
        if others:
            pairs = zip(scores, others, strict=True)
            figures[kind] = _mean([score[0] > other for score, other in pairs])
    return figures


def _questions(request: EditRequest) -> dict[str, list[_Question]]:
    """The questions of a request, by kind of figure."""
    new, true = request.target_new, request.target_true
    follows = request.portability_prompts
    before: Sequence[str | None] = request.portability_targets_true or [None] * len(follows)
    return {
        "efficacy": [(request.text, new, true)],
        "generalization": [(prompt, new, true) for prompt in request.paraphrase_prompts],
        "specificity": [(prompt, true, new) for prompt in request.neighborhood_prompts],
        "portability": list(zip(follows, request.portability_targets, before, strict=True)),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
