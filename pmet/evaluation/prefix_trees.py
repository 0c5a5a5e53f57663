"""Sequences as trees, in which common beginnings occur only once.

A pack is a row of a batch that holds a tree of tokens. Each token has the position that it has in
its sequences, and attends to the tokens before it in them, regardless of the rest of the row. So
the model computes the same for it as in any of these sequences, and there is hardly any padding.

That requires a model that accepts positions and a mask for each pair of tokens, which is tried on
its miniature. For other models, a pack is a single sequence.

Shape letters: B packs, N tokens of a pack, D longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pmet.evaluation.prompts import Tokens
from pmet.model import SAME, farthest_apart, holds, pad

MOST = 64
"""Maximum tokens in a pack: attention processes every pair of them."""


@dataclass
class Pack:
    """A tree of tokens, parents first.

    Attributes:
        ids: the tokens.
        paths: for each token, the indices of its predecessors in its sequences, then its own.
        sequences: each sequence in the pack, with the indices of its tokens.
    """

    ids: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=list)
    sequences: list[tuple[Tokens, tuple[int, ...]]] = field(default_factory=list)

    def shared(self, sequence: Tokens) -> int:
        """The number of tokens that a sequence has in common with the last one."""
        last = self.sequences[-1][0] if self.sequences else ()
        same = (i for i, (a, b) in enumerate(zip(last, sequence, strict=False)) if a != b)
        return next(same, min(len(last), len(sequence)))

    def add(self, sequence: Tokens) -> None:
        """Add a sequence, reusing the tokens it has in common with the last one."""
        shared = self.shared(sequence)
        path = self.sequences[-1][1][:shared] if self.sequences else ()
        for token in sequence[shared:]:
            path = (*path, len(self.ids))
            self.ids.append(token)
            self.paths.append(path)
        self.sequences.append((sequence, path))


def reads_trees(model: nn.Module, longest: int) -> bool:
    """Whether a model can read trees of sequences of at most ``longest`` tokens."""
    config: Any = model.config
    names = ("sliding_window", "window_size", "attention_chunk_size")
    windows = (getattr(config, name, None) for name in names)
    # A pairwise mask replaces the model's own, including its sliding window.
    if any(window is not None and window < longest for window in windows):
        return False
    return holds(model, _reads_trees)


_SEQUENCES = ((3, 5, 8, 2), (3, 5, 7), (3, 5, 7, 1, 4), (6,), (6, 2))


@torch.no_grad()
def _reads_trees(model: nn.Module) -> bool:
    """Whether a model computes the same for a tree as for its sequences."""
    (pack,) = packed(_SEQUENCES, MOST)
    logits_NV = model(**inputs(model, [pack], trees=True), use_cache=False).logits[0]
    alone = [
        model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        for sequence, _ in pack.sequences
    ]
    in_tree = [logits_NV[list(path)] for _, path in pack.sequences]
    return farthest_apart(in_tree, alone) <= SAME


def packed(sequences: Iterable[Tokens], most: int) -> list[Pack]:
    """Put all sequences into packs of at most ``most`` tokens, smallest first.

    A longer sequence is a pack of its own; with ``most`` 0 every sequence is.
    """
    packs: list[Pack] = []
    for sequence in sorted(sequences):
        pack = packs[-1] if packs else None
        if pack is None or len(pack.ids) + len(sequence) - pack.shared(sequence) > most:
            pack = Pack()
            packs.append(pack)
        pack.add(sequence)
    packs.sort(key=lambda pack: len(pack.ids))
    return packs


def inputs(model: nn.Module, packs: Sequence[Pack], *, trees: bool) -> dict[str, torch.Tensor]:
    """The model's arguments for reading packs side by side, with padding on the right."""
    weight = next(model.parameters())
    ids_BN, mask_BN = pad([pack.ids for pack in packs], weight.device)
    if not trees:
        return {"input_ids": ids_BN, "attention_mask": mask_BN}
    # Padding attends to itself: the softmax of a fully masked row is undefined.
    alone = [[(i,) for i in range(len(pack.ids), ids_BN.shape[1])] for pack in packs]
    paths = [[*pack.paths, *rest] for pack, rest in zip(packs, alone, strict=True)]
    depth = max(len(path) for rows in paths for path in rows)
    # Shorter paths are filled by repeating the last index.
    index_BND = torch.tensor(
        [[path + path[-1:] * (depth - len(path)) for path in rows] for rows in paths]
    )
    seen_BNN = torch.zeros(*ids_BN.shape, ids_BN.shape[1], dtype=torch.bool)
    seen_BNN.scatter_(2, index_BND, value=True)
    mask = torch.zeros(seen_BNN.shape, dtype=weight.dtype)
    mask.masked_fill_(~seen_BNN, torch.finfo(weight.dtype).min)
    positions = torch.tensor([[len(path) - 1 for path in rows] for rows in paths])
    return {
        "input_ids": ids_BN,
        "attention_mask": mask[:, None].to(weight.device),
        "position_ids": positions.to(weight.device),
    }
