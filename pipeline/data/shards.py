"""Shards: contiguous ranges of requests that are computed together.

They depend only on the job, so the worker that computes a shard never changes its contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.rows import Place, places_from


@dataclass(frozen=True)
class Shard:
    """Places ``start`` (included) to ``stop`` (excluded) among the accepted requests.

    Attributes:
        index: number of the shard, from 0.
        start: first place.
        stop: the place after the last.
    """

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The stem of the shard's file, for example ``00007``."""
        return f"{self.index:05d}"

    @property
    def places(self) -> Sequence[Place]:
        """The places of its requests among the accepted ones."""
        return places_from(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(count: int, shard_size: int, groups: Sequence[int] | None = None) -> list[Shard]:
    """Split ``count`` rows into shards of ``shard_size`` rows; the last one may be shorter.

    Args:
        count: number of rows.
        shard_size: number of rows in a shard.
        groups: the group of each row, if groups must not be split: a shard is then extended to
            the end of its last group. A group's rows are adjacent.

    Raises:
        ValueError: ``count`` is negative or ``shard_size`` is not positive.
    """
    if count < 0 or shard_size < 1:
        raise ValueError(f"cannot cut {count} rows into shards of {shard_size}")
    shards: list[Shard] = []
    start = 0
    while start < count:
        stop = min(start + shard_size, count)
        while groups and stop < count and groups[stop] == groups[stop - 1]:
            stop += 1
        shards.append(Shard(len(shards), start, stop))
        start = stop
    return shards
