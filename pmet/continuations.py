"""How likely given continuations are, and whether they are the greedy ones; many at a time.

What is asked of one prompt shares its pass: sequences of which one begins with the other are one
row of a batch, since a causal model never looks ahead. So a prompt with any number of one-token
targets is one row, read once. The head runs only at the places that are read.

How a batch is put together changes rounding, by some 1e-5 in a log-probability of float32. Where a
verdict hangs on less than ``NEAR``, the pair is computed once more as `pmet.plain` does, by itself:
so every verdict is the plain one, as long as rounding stays below half of ``NEAR``.

Shape letters: B rows, T tokens, N places that are read, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from pmet.kernels import tuned
from pmet.padding import batches_by_tokens, pad
from pmet.plain import plain_score
from pmet.problem import context_length
from pmet.prompts import Continuation, Prompts, Tokens
from pmet.tracing import changed_input, frozen

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass."""
NEAR = 3e-4
"""Nats that decide a verdict, below which it is computed by itself."""
_SHORT = 128  # tokens of rows for which the kernels for short rows are the faster ones


class Scored(NamedTuple):
    """What a model makes of a target.

    Attributes:
        log_prob: mean over its tokens, given the prompt and those before, in nats.
        greedy: whether each of them is the likeliest one.
        accuracy: the share of them that are.
    """

    log_prob: float
    greedy: bool
    accuracy: float


UNREADABLE = Scored(math.nan, False, 0.0)
"""What is longer than the model's context."""


@dataclass
class _Row:
    """A sequence, and the pairs that are read from it."""

    ids: Tokens
    asked: list[tuple[Continuation, int, Tokens]] = field(default_factory=list)


class _Read(NamedTuple):
    """What a row says of a pair, and whether its greediness hangs on less than ``NEAR``."""

    score: Scored
    near: bool


@torch.no_grad()
def score_continuations(
    model: nn.Module,
    prompts: Prompts,
    pairs: Sequence[Continuation],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[Continuation, Scored]:
    """Score each (prompt, target).

    Args:
        model: a causal language model; left as it was.
        prompts: how they are put to it.
        pairs: prompts and targets; what is there twice is computed once.
        batch_tokens: padded tokens of one forward pass; a choice of speed.
        on_progress: told how many pairs have just been scored.

    Raises:
        RequestError: a target has no tokens.
    """
    pairs = list(dict.fromkeys(pairs))
    limit = context_length(model.config) or math.inf
    tokens: dict[Continuation, tuple[Tokens, Tokens]] = {}
    scored: dict[Continuation, Scored] = {}
    for pair, (prompt, target) in zip(pairs, prompts.continuations(pairs), strict=True):
        if len(prompt) + len(target) - 1 > limit:
            scored[pair] = UNREADABLE
        else:
            tokens[pair] = (prompt, target)
    near: set[Continuation] = set()
    with frozen(model):
        rows = _rows(tokens)
        for batch in batches_by_tokens(rows, batch_tokens, lambda row: len(row.ids)):
            longest = len(batch[-1].ids)
            with tuned(model, longest) if longest <= _SHORT else nullcontext():
                read = _read(model, batch)
            scored |= {pair: found.score for pair, found in read.items()}
            near |= {pair for pair, found in read.items() if found.near}
            if on_progress:
                on_progress(len(read))
        for pair in near.union(_near_each_other(scored)):
            scored[pair] = Scored(*plain_score(model, *tokens[pair]))
    return scored


def _rows(tokens: Mapping[Continuation, tuple[Tokens, Tokens]]) -> list[_Row]:
    """The sequences that hold all others at their beginning, the shortest first."""
    asked = defaultdict(list)
    for pair, (prompt, target) in tokens.items():
        # The last token predicts nothing that is asked for.
        asked[prompt + target[:-1]].append((pair, len(prompt) - 1, target))
    rows: list[_Row] = []
    for ids in sorted(asked, reverse=True):
        # In this order what begins with ``ids`` stands right before it.
        if not rows or rows[-1].ids[: len(ids)] != ids:
            rows.append(_Row(ids))
        rows[-1].asked += asked[ids]
    rows.sort(key=lambda row: len(row.ids))
    return rows


def _read(model: nn.Module, batch: Sequence[_Row]) -> dict[Continuation, _Read]:
    """Run rows through the model, and read all that is asked of them."""
    device = next(model.parameters()).device
    ids_BT, mask_BT = pad([row.ids for row in batch], device)
    number: dict[tuple[int, int], int] = {}
    places: list[int] = []
    labels: list[int] = []
    for i, row in enumerate(batch):
        for _, start, target in row.asked:
            for column in range(start, start + len(target)):
                places.append(number.setdefault((i, column), len(number)))
            labels += target
    rows_N, columns_N = torch.tensor(list(number), device=device).T
    logits_NV = logits_at(model, ids_BT, mask_BT, rows_N, columns_N)
    places_M, labels_M = (torch.tensor(x, device=device) for x in (places, labels))
    top_N2, best_N2 = logits_NV.topk(2)
    said_M = logits_NV[places_M, labels_M].double()
    log_probs_M = said_M - logits_NV.logsumexp(-1).double()[places_M]
    right_M = best_N2[places_M, 0] == labels_M
    # To the best of the others.
    gap_M = said_M - torch.where(right_M, top_N2[places_M, 1], top_N2[places_M, 0])
    columns = (x.tolist() for x in (log_probs_M, right_M, gap_M.abs() < NEAR))
    log_probs, right, close = columns
    found: dict[Continuation, _Read] = {}
    end = 0
    for row in batch:
        for pair, _, target in row.asked:
            start, end = end, end + len(target)
            hits, count = sum(right[start:end]), len(target)
            mean = math.fsum(log_probs[start:end]) / count
            score = Scored(mean, hits == count, hits / count)
            found[pair] = _Read(score, any(close[start:end]))
    return found


def logits_at(
    model: nn.Module,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    rows_N: torch.Tensor,
    columns_N: torch.Tensor,
) -> torch.Tensor:
    """Next-token logits at places of a batch, (N, V), at least float32.

    Over a large vocabulary the head is most of the work: it runs at these places only.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    with changed_input(head, lambda hidden: hidden[rows_N, columns_N][None]):
        output = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    logits_NV: torch.Tensor = output.logits[0]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _near_each_other(scored: Mapping[Continuation, Scored]) -> Iterable[Continuation]:
    """Targets of one prompt of which nearly the same is said."""
    by_prompt = defaultdict(list)
    for (prompt, target), score in scored.items():
        if not math.isnan(score.log_prob):
            by_prompt[prompt].append((score.log_prob, target))
    for prompt, said in by_prompt.items():
        said.sort()
        for (lower, one), (higher, other) in pairwise(said):
            if higher - lower < NEAR:
                yield from ((prompt, one), (prompt, other))
