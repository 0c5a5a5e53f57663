"""Scores of continuations, many at a time: how likely each is, and whether it is the greedy one.

All questions about one prompt share a pass: if one sequence begins with another, only the longer is
read, since a causal model never looks ahead. So a prompt with any number of one-token targets is
read once. Common beginnings of different sequences are read once as well
(`pmet.evaluation.prefix_trees`), and the head runs only at the positions that are needed.

The composition of a batch changes rounding, by about 1e-5 in a log-probability in float32. If a
verdict depends on less than ``NEAR``, the pair is computed once more alone, as in `pmet.reference`:
so every verdict equals the plain one, as long as rounding stays below half of ``NEAR``.

Shape letters: N positions read, M tokens of targets, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from pmet.evaluation.prefix_trees import MOST, Pack, inputs, packed, reads_trees
from pmet.evaluation.prompts import Continuation, Prompts, Tokens
from pmet.model import batches_by_tokens, changed_input, context_length, frozen, tuned_if_short
from pmet.reference import plain_score

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass."""
NEAR = 3e-4
"""Margin in nats below which a verdict is recomputed alone."""


class Scored(NamedTuple):
    """A model's score of a target.

    Attributes:
        log_prob: mean over its tokens, given the prompt and the tokens before, in nats.
        greedy: whether each of them is the most likely one.
        accuracy: the share of them that are.
    """

    log_prob: float
    greedy: bool
    accuracy: float


UNREADABLE = Scored(math.nan, False, 0.0)
"""Error text for a sequence longer than the model's context."""


Key = TypeVar("Key", bound=Hashable)
# A target's key, the position of its prompt's last token in its sequence, and its tokens.
_Asked = tuple[Key, int, Tokens]


class _Read(NamedTuple):
    """A row's result for a target, and whether its greediness depends on less than ``NEAR``."""

    score: Scored
    near: bool


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
        model: a causal language model; left unchanged.
        prompts: how prompts are presented to the model.
        pairs: prompts and targets, possibly with their separators; repeated ones are computed once.
        batch_tokens: padded tokens of one forward pass; affects only speed.
        on_progress: called with the number of pairs just scored.

    Raises:
        RequestError: a target has no tokens.
    """
    pairs = list(dict.fromkeys(pairs))
    tokens = dict(zip(pairs, prompts.continuations(pairs), strict=True))
    scored = score_tokens(model, tokens, batch_tokens=batch_tokens, on_progress=on_progress)
    return scored | _alone(model, tokens, _near_each_other(scored))


def score_tokens(
    model: nn.Module,
    tokens: Mapping[Key, tuple[Tokens, Tokens]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[Key, Scored]:
    """Score targets by their tokens.

    Args:
        model: a causal language model; left unchanged.
        tokens: under any key, the tokens of a prompt and of its target, at least one each.
        batch_tokens: padded tokens of one forward pass; affects only speed.
        on_progress: called with the number of targets just scored.
    """
    limit = context_length(model.config) or math.inf
    readable = {key: own for key, own in tokens.items() if sum(map(len, own)) - 1 <= limit}
    scored = dict.fromkeys(tokens, UNREADABLE)
    asked = _by_sequence(readable)
    longest = max(map(len, asked), default=0)
    trees = reads_trees(model, longest)
    packs = packed(asked, MOST if trees else 0)
    near: set[Key] = set()
    with torch.no_grad(), frozen(model), tuned_if_short(model, max(longest, MOST)):
        for batch in batches_by_tokens(packs, batch_tokens, lambda pack: len(pack.ids)):
            read = _read(model, batch, asked, trees=trees)
            scored |= {key: found.score for key, found in read.items()}
            near |= {key for key, found in read.items() if found.near}
            if on_progress:
                on_progress(len(read))
    return scored | _alone(model, readable, near)


def _alone(
    model: nn.Module, tokens: Mapping[Key, tuple[Tokens, Tokens]], keys: Iterable[Key]
) -> dict[Key, Scored]:
    """The plain scores of some targets."""
    with torch.no_grad(), frozen(model):
        return {key: Scored(*plain_score(model, *tokens[key])) for key in keys}


def _by_sequence(
    tokens: Mapping[Key, tuple[Tokens, Tokens]],
) -> dict[Tokens, list[_Asked[Key]]]:
    """The targets to read from each sequence; prefixes of others are read from the longest."""
    own: dict[Tokens, list[_Asked[Key]]] = defaultdict(list)
    for key, (prompt, target) in tokens.items():
        # The last token predicts nothing that is needed.
        own[prompt + target[:-1]].append((key, len(prompt) - 1, target))
    asked: dict[Tokens, list[_Asked[Key]]] = {}
    longest: Tokens = ()
    for ids in sorted(own, reverse=True):
        # In this order, sequences that begin with ``ids`` directly precede it.
        if longest[: len(ids)] != ids:
            longest = ids
            asked[longest] = []
        asked[longest] += own[ids]
    return asked


def _read(
    model: nn.Module,
    batch: Sequence[Pack],
    asked: Mapping[Tokens, Sequence[_Asked[Key]]],
    *,
    trees: bool,
) -> dict[Key, _Read]:
    """Run packs through the model, and read all targets of their sequences."""
    device = next(model.parameters()).device
    number: dict[tuple[int, int], int] = {}
    places: list[int] = []
    labels: list[int] = []
    counts: list[tuple[Key, int]] = []
    for i, pack in enumerate(batch):
        for sequence, path in pack.sequences:
            for key, start, target in asked[sequence]:
                for column in path[start : start + len(target)]:
                    places.append(number.setdefault((i, column), len(number)))
                labels += target
                counts.append((key, len(target)))
    rows_N, columns_N = torch.tensor(list(number), device=device).T
    logits_NV = logits_at(model, inputs(model, batch, trees=trees), rows_N, columns_N)
    places_M, labels_M = (torch.tensor(x, device=device) for x in (places, labels))
    top_N2, best_N2 = logits_NV.topk(2)
    said_M = logits_NV[places_M, labels_M].double()
    log_probs_M = said_M - logits_NV.logsumexp(-1).double()[places_M]
    right_M = best_N2[places_M, 0] == labels_M
    # The margin to the best other token.
    gap_M = said_M - torch.where(right_M, top_N2[places_M, 1], top_N2[places_M, 0])
    columns = (x.tolist() for x in (log_probs_M, right_M, gap_M.abs() < NEAR))
    log_probs, right, close = columns
    found: dict[Key, _Read] = {}
    end = 0
    for key, count in counts:
        start, end = end, end + count
        hits = sum(right[start:end])
        score = Scored(math.fsum(log_probs[start:end]) / count, hits == count, hits / count)
        found[key] = _Read(score, any(close[start:end]))
    return found


def logits_at(
    model: nn.Module,
    given: Mapping[str, torch.Tensor],
    rows_N: torch.Tensor,
    columns_N: torch.Tensor,
) -> torch.Tensor:
    """Next-token logits at positions of a batch, (N, V), at least float32.

    With a large vocabulary the head is most of the work: it runs only at these positions.

    Args:
        model: a causal language model.
        given: the batch, as the model's arguments.
        rows_N: rows of the positions.
        columns_N: their columns.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    with changed_input(head, lambda hidden: hidden[rows_N, columns_N][None]):
        output = model(**given, use_cache=False)
    logits_NV: torch.Tensor = output.logits[0]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _near_each_other(scored: Mapping[Continuation, Scored]) -> Iterable[Continuation]:
    """Targets of one prompt whose scores are nearly equal."""
    by_prompt = defaultdict(list)
    for pair, score in scored.items():
        if not math.isnan(score.log_prob):
            by_prompt[pair[0]].append((score.log_prob, pair))
    for said in by_prompt.values():
        said.sort()
        for (lower, one), (higher, other) in pairwise(said):
            if higher - lower < NEAR:
                yield from (one, other)
