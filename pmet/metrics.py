"""What a model says about edit requests, in the field's metrics.

docs/metrics.md has each figure with its definition and source. In short, of the prompts of a
request:

- efficacy: on the request's own prompt, the new target against the true one
- generalization: the same on paraphrase prompts
- specificity: on neighborhood prompts, the true target against the new one
- portability: on prompts about what follows from the fact, their own answers

each in the probability form (the wanted target is likelier than the other one, by mean
log-probability over its tokens), the strict form (``_strict``: it is the greedy answer at every
one of its tokens) and by tokens (``_accuracy``: the share of them where it is). ``score`` is the
harmonic mean of the first three. Where it is asked for, fluency and consistency of written text.

A request's figure is the mean over its prompts; a model's is the mean over the prompts of all
requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet.continuations import BATCH_TOKENS, Scored, logits_at, score_continuations
from pmet.figures import METRICS, summarize
from pmet.generation import write_on
from pmet.lookup import encode_all
from pmet.padding import batches_by_tokens, pad
from pmet.problem import context_length
from pmet.prompts import Continuation, Prompts
from pmet.request import EditRequest
from pmet.texts import add_consistency
from pmet.texts import fluency as fluency_of
from pmet.tracing import frozen

__all__ = ["METRICS", "TextScore", "evaluate", "knows", "measure_requests", "score_texts"]

_Scores = Mapping[Continuation, Scored]
# Prompt, wanted answer, and the one that it is compared with.
_Question = tuple[str, str | None, str | None]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    fluency: bool = False,
    chat_template: bool = False,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure what a model says about edit requests.

    Args:
        model: a causal language model; left as it was.
        tokenizer: its fast tokenizer.
        requests: requests with what is to be measured on them: probability figures need
            ``target_true``, the others need paraphrase, neighborhood or portability prompts.
        fluency: let the model write, and measure fluency and consistency.
        chat_template: ask every prompt as a user's turn of the tokenizer's chat.
        seed: of what is drawn while the model writes.
        batch_tokens: padded tokens of one forward pass; a choice of speed.
        on_progress: told how many continuations have just been scored.

    Returns:
        The figures of ``METRICS``, ``fluency``, ``consistency`` and ``score``: fractions in [0, 1]
        (fluency in bits), or None where no request has what they need; and ``rows``: the same
        figures for each request, with the number of prompts that they are means over
        (``efficacy_prompts``, …) and the ``text`` that the model wrote.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    rows = measure_requests(
        model,
        Prompts(tokenizer, chat_template),
        requests,
        writing_seed=seed if fluency else None,
        batch_tokens=batch_tokens,
        on_progress=on_progress,
    )
    if fluency:
        add_consistency(zip(rows, (r.reference_texts for r in requests), strict=True))
    return {**summarize(rows), "rows": rows}


def measure_requests(
    model: nn.Module,
    prompts: Prompts,
    requests: Sequence[EditRequest],
    *,
    writing_seed: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The figures of each request; consistency, which needs all of them, is left to the caller.

    Args:
        model: a causal language model; left as it was.
        prompts: how prompts are put to it.
        requests: the requests.
        writing_seed: seed of what is drawn while the model writes; None: it does not write.
        batch_tokens: padded tokens of one forward pass.
        on_progress: told how many continuations have just been scored.
    """
    pairs = [pair for request in requests for pair in _continuations(request)]
    scored = score_continuations(
        model, prompts, pairs, batch_tokens=batch_tokens, on_progress=on_progress
    )
    rows = [_row(request, scored) for request in requests]
    if writing_seed is not None:
        begun = [request.generation_prompts or (request.text,) for request in requests]
        starts = list(dict.fromkeys(text for texts in begun for text in texts))
        written = write_on(model, prompts, starts, seed=writing_seed)
        by_start = dict(zip(starts, written, strict=True))
        for row, texts in zip(rows, begun, strict=True):
            own = [by_start[text] for text in texts]
            row |= {"fluency": fluency_of(own), "text": "\n".join(own)}
    return rows


def knows(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[bool]:
    """Whether the greedy answer to each request's own prompt is its new target already.

    This is ``efficacy_strict`` alone, for one short pass a request.
    """
    asked = [(request.text, request.target_new) for request in requests]
    scored = score_continuations(model, Prompts(tokenizer), asked, batch_tokens=batch_tokens)
    return [scored[pair].greedy for pair in asked]


@dataclass(frozen=True)
class TextScore:
    """What a model makes of one text.

    Attributes:
        nll: sum of −log p over its tokens but the first, in nats.
        greedy: the likeliest token at each of these places.
    """

    nll: float
    greedy: list[int]

    def agreed(self, other: TextScore) -> int:
        """Places where two models have the same likeliest token."""
        return sum(a == b for a, b in zip(self.greedy, other.greedy, strict=True))


@torch.no_grad()
def score_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_tokens: int = 512
) -> list[TextScore]:
    """Score ordinary text: for perplexity, and for agreement with another model.

    Perplexity is exp of all texts' ``nll`` through the number of their tokens but each first one.

    Args:
        model: a causal language model; left as it was.
        tokenizer: its fast tokenizer.
        texts: the texts.
        max_tokens: that a text is cut at.
    """
    limit = min(max_tokens, context_length(model.config) or max_tokens)
    sequences = [ids[:limit] for ids in encode_all(tokenizer, texts)]
    scores = [TextScore(0.0, [])] * len(texts)
    order = sorted(
        (i for i, s in enumerate(sequences) if len(s) > 1), key=lambda i: len(sequences[i])
    )
    device = next(model.parameters()).device
    with frozen(model):
        for batch in batches_by_tokens(order, BATCH_TOKENS, lambda i: len(sequences[i])):
            ids_BT, mask_BT = pad([sequences[i][:-1] for i in batch], device)
            rows_N, columns_N = mask_BT.nonzero(as_tuple=True)
            logits_NV = logits_at(model, ids_BT, mask_BT, rows_N, columns_N)
            labels_N = torch.tensor([t for i in batch for t in sequences[i][1:]], device=device)
            said_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
            nll_N = (logits_NV.logsumexp(-1) - said_N).double()
            lengths = [len(sequences[i]) - 1 for i in batch]
            parts = zip(nll_N.split(lengths), logits_NV.argmax(-1).split(lengths), strict=True)
            for i, (nll_T, best_T) in zip(batch, parts, strict=True):
                scores[i] = TextScore(nll_T.sum().item(), best_T.tolist())
    return scores


def _questions(request: EditRequest) -> dict[str, list[_Question]]:
    """What a request asks, by kind of figure."""
    new, true = request.target_new, request.target_true
    follows = request.portability_prompts
    before: Sequence[str | None] = request.portability_targets_true or [None] * len(follows)
    return {
        "efficacy": [(request.text, new, true)],
        "generalization": [(prompt, new, true) for prompt in request.paraphrase_prompts],
        "specificity": [(prompt, true, new) for prompt in request.neighborhood_prompts],
        "portability": list(zip(follows, request.portability_targets, before, strict=True)),
    }


def _continuations(request: EditRequest) -> list[Continuation]:
    """The pairs that a request's figures need."""
    return [
        (prompt, target)
        for questions in _questions(request).values()
        for prompt, wanted, other in questions
        if wanted is not None
        for target in (wanted, other)
        if target is not None
    ]


def _row(request: EditRequest, scored: _Scores) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(METRICS)
    for kind, questions in _questions(request).items():
        figures[f"{kind}_prompts"] = len(questions)
        scores = [scored[prompt, wanted] for prompt, wanted, _ in questions if wanted is not None]
        if not scores:
            continue
        figures[f"{kind}_strict"] = _mean([score.greedy for score in scores])
        figures[f"{kind}_accuracy"] = _mean([score.accuracy for score in scores])
        others = [
            scored[prompt, other].log_prob for prompt, _, other in questions if other is not None
        ]
        if others:
            likelier = zip(scores, others, strict=True)
            figures[kind] = _mean([score.log_prob > other for score, other in likelier])
    return figures


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
