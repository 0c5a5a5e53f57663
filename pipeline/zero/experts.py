"""Solving for the experts of a layer, each on one rank.

Every rank has the sums of its own requests, for each expert that one of them is routed to. An
expert's sums are added on one rank, which solves for its Δ and broadcasts it; as many experts as
there are ranks are solved at a time. Experts that no request is routed to take no part.

Shape letters: X experts, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from pipeline.zero.collectives import add_up, added, broadcast, raise_together, reduce_to
from pmet.errors import NumericalError
from pmet.update import ExpertSums, solve_experts


class SolvedExpert(NamedTuple):
    """An expert's Δ, on every rank, valid until the next one; and the jitter of its solve."""

    expert: int
    delta_VK: torch.Tensor
    jitter: float


def solved_experts(
    sums: ExpertSums,
    second_moments_XKK: torch.Tensor,
    weight: float,
    share: float,
    *,
    rank: int,
    ranks: int,
) -> Iterator[SolvedExpert]:
    """Yield Δ of each expert that a request of any rank is routed to, in order.

    Args:
        sums: those of this rank's requests; used up.
        second_moments_XKK: C by expert.
        weight: λ.
        share: the share of the residuals that the layer takes.
        rank: this rank.
        ranks: their number.

    Raises:
        NumericalError: a solve failed; all ranks raise the same error.
    """
    experts = _routed(sums, len(second_moments_XKK))
    for start in range(0, len(experts), ranks):
        together = experts[start : start + ranks]
        for owner, expert in enumerate(together):
            _collect_on(owner, expert, sums)
        solved = _own(sums, together[rank : rank + 1], second_moments_XKK, weight, share)
        for owner, expert in enumerate(together):
            delta_VK = solved.delta_VK if owner == rank else _room(sums)
            broadcast(delta_VK, owner)
            jitter = added(solved.jitter if owner == rank else 0.0)
            yield SolvedExpert(expert, delta_VK, jitter)
        sums.by_expert = {e: s for e, s in sums.by_expert.items() if e not in together}


def _routed(sums: ExpertSums, experts: int) -> list[int]:
    """The experts that a request of any rank is routed to."""
    counts_X = torch.zeros(experts, dtype=torch.float64, device=sums.device)
    counts_X[list(sums.by_expert)] = 1
    add_up(counts_X)
    found: list[int] = counts_X.nonzero()[:, 0].tolist()
    return found


def _collect_on(owner: int, expert: int, sums: ExpertSums) -> None:
    """Add an expert's sums up on one rank."""
    own = sums.of(expert)
    reduce_to(own.gram_KK, owner)
    reduce_to(own.cross_VK, owner)


def _own(
    sums: ExpertSums,
    experts: Sequence[int],
    second_moments_XKK: torch.Tensor,
    weight: float,
    share: float,
) -> SolvedExpert:
    """The solution of this rank's expert, or an empty one if it has none."""
    solved, failure = SolvedExpert(-1, _room(sums), 0.0), None
    try:
        for found in solve_experts(sums, second_moments_XKK, weight, share, experts=experts):
            solved = SolvedExpert(*found)
    except NumericalError as error:
        failure = error
    raise_together(failure)
    return solved


def _room(sums: ExpertSums) -> torch.Tensor:
    key_width, value_width = sums.widths
    return torch.empty(value_width, key_width, dtype=torch.float64, device=sums.device)
