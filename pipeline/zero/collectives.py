"""Collective operations besides gathering weights: lockstep, and the rows of a matrix in turn.

All ranks of a process group must call these together, and in the same order. A process without a
group is its own only rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def added(number: int | float) -> float:
    """The sum of a number over all ranks, in float64."""
    if _alone():
        return float(number)
    total = torch.tensor(float(number), dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.item()


def add_up(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all ranks."""
    if not _alone():
        dist.all_reduce(tensor)


def reduce_to(tensor: torch.Tensor, rank: int) -> None:
    """Replace a tensor by its sum over all ranks, on one of them; elsewhere it is used up."""
    if not _alone():
        dist.reduce(tensor, dst=rank)


def broadcast(tensor: torch.Tensor, rank: int) -> None:
    """Replace a tensor by that of one rank."""
    if not _alone():
        dist.broadcast(tensor, src=rank)


def raise_together(failure: Exception | None) -> None:
    """Raise the first rank's failure on all ranks, if any has one."""
    failures = [failure]
    if not _alone():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise found


def largest(number: float) -> float:
    """The largest value of a number over all ranks, in float64; infinite if any is NaN."""
    if _alone():
        return math.inf if math.isnan(number) else float(number)
    # Backends disagree about NaN in a maximum.
    number = math.inf if math.isnan(number) else number
    if _alone():
        return number
    most = torch.tensor(number, dtype=torch.float64, device=_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()


def padded_steps(steps: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest number of steps of any rank in the group: all ranks must run that many.

    Args:
        steps: this rank's number of forwards.
        group: the ranks that must agree; None: all ranks.
    """
    if _alone():
        return steps
    most = torch.tensor(steps, dtype=torch.int64, device=_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most.item())


def in_lockstep(
    items: Sequence[Item], filler: Item, group: dist.ProcessGroup | None = None
) -> Iterator[tuple[Item, bool]]:
    """Yield this rank's items, then the filler until every rank has taken as many steps.

    Yields:
        An item and True, or the filler and False: run it, and discard the result.
    """
    steps = padded_steps(len(items), group)
    for item in items:
        yield item, True
    for _ in range(steps - len(items)):
        yield filler, False


def share_of_rows(count: int, rank: int, ranks: int) -> slice:
    """A rank's share of ``count`` rows: equal shares in rank order, the last smaller."""
    each = -(-count // ranks)
    return slice(min(count, rank * each), min(count, (rank + 1) * each))


def rows_in_turn(own: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the rows of each rank, one rank after the other, in rank order.

    Ranks may have different numbers of rows; the whole is never in one place. Each yielded tensor
    is valid until the next one.
    """
    if _alone():
        yield own
        return
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=own.device)
    counts[dist.get_rank()] = len(own)
    dist.all_reduce(counts)
    for rank, count in enumerate(counts.tolist()):
        rows = own.contiguous() if rank == dist.get_rank() else own.new_empty(count, *own.shape[1:])
        if count:
            dist.broadcast(rows, src=rank)
        yield rows


def all_rows(own: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order, on every rank."""
    return torch.cat([rows.clone() for rows in rows_in_turn(own)])


def reduced_to_rows(matrix: torch.Tensor) -> torch.Tensor:
    """This rank's `share_of_rows` of the sum of all ranks' matrices; ``matrix`` is overwritten."""
    if _alone():
        return matrix
    own, ranks = dist.get_rank(), dist.get_world_size()
    for rank in range(ranks):
        share = share_of_rows(len(matrix), rank, ranks)
        if share.start < share.stop:
            dist.reduce(matrix[share], dst=rank)
    return matrix[share_of_rows(len(matrix), own, ranks)].clone()


def _alone() -> bool:
    return not dist.is_initialized()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu")
