"""Token sequences of different lengths as rectangles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (1: token, 0: padding), both (rows, longest) int64.

    Padding is token 0, which every vocabulary has; the mask hides it.
    """
    longest = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        padding = [0] * (longest - len(sequence))
        tokens, ones = list(sequence), [1] * len(sequence)
        ids.append(padding + tokens if left else tokens + padding)
        mask.append(padding + ones if left else ones + padding)
    shape = (len(sequences), longest)
    return (
        torch.tensor(ids, dtype=torch.int64, device=device).reshape(shape),
        torch.tensor(mask, dtype=torch.int64, device=device).reshape(shape),
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of every token in its own row; padding in front has none and gets 0."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def batches_by_tokens(
    items: Sequence[Item], budget: int, length: Callable[[Item], int]
) -> Iterator[Sequence[Item]]:
    """Split ``items``, ascending in length, into batches of at most ``budget`` padded tokens.

    An item longer than the budget is a batch of its own.
    """
    start = 0
    for stop in range(1, len(items) + 1):
        if stop == len(items) or (stop + 1 - start) * length(items[stop]) > budget:
            yield items[start:stop]
            start = stop
