"""A layer's Δ as the ranks find it, part by part, and what they report about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from pmet.delta import delta_block
from pmet.update import Form


@dataclass(frozen=True)
class LayerReport:
    """The effect of the update on one weight.

    Attributes:
        parameter: its name.
        file: saved edit of this layer, in the run folder.
        sha256: of that file.
        delta_norm: Frobenius norm of Δ.
        weight_norm: Frobenius norm of the original weight.
        requests: number of requests that the edit holds.
        solves: number of solves whose sum Δ is.
        form: the form of the solve: ``keys`` or ``requests`` (see `pmet.update.solver`).
        weight: λ, of the last solve.
        jitter: added to the factored matrix, relative to its mean diagonal element; usually 0. Of
            several solves the largest.
        rounding: ‖what the checkpoint's dtype rounds off‖ / ‖Δ‖.
        largest: the largest |W + Δ|.
        dtype: dtype of the weight in the checkpoint.
    """

    parameter: str
    file: str
    sha256: str
    delta_norm: float
    weight_norm: float
    requests: int
    solves: int
    form: Form
    weight: float
    jitter: float
    rounding: float
    largest: float
    dtype: str


class Block(NamedTuple):
    """A part of Δ, the same on every rank, and where in the weight it starts."""

    block: torch.Tensor
    top: int
    left: int


class Solved(NamedTuple):
    """The parts of Δ in turn, and how they were found.

    Attributes:
        blocks: the parts; all ranks must take them together.
        requests: number of requests that Δ holds.
        form: the form of the solve.
        weight: λ.
        jitters: one per solve, once its part has been taken.
        partial: whether some of the weight is in no part: experts without requests.
    """

    blocks: Iterator[Block]
    requests: int
    form: Form
    weight: float
    jitters: list[float]
    partial: bool = False


def on_top(solved: Solved, path: Path, shape: torch.Size, held: LayerReport) -> Solved:
    """The sum of Δ and of what earlier solves have saved, part by part.

    Args:
        solved: Δ of this solve; used up.
        path: a local copy of the edit that earlier solves have saved.
        shape: shape of the weight.
        held: the report of the earlier solves.
    """

    def blocks() -> Iterator[Block]:
        seen = set()
        for block, top, left in solved.blocks:
            seen.add(top)
            size = (len(block), block.shape[1])
            earlier = delta_block(path, held.parameter, size, top, left)
            yield Block(block + earlier.to(block.device), top, left)
        if solved.partial:
            yield from _others(seen)

    def _others(seen: set[int]) -> Iterator[Block]:
        """Experts that requests were routed to in earlier solves, but not in this one."""
        matrices, *size = shape
        for top in range(0, matrices * size[0], size[0]):
            if top not in seen:
                block = delta_block(path, held.parameter, (size[0], size[1]), top)
                if block.any():
                    yield Block(block, top, 0)

    return solved._replace(blocks=blocks())
