"""Two ways to number requests, kept apart by type.

A *row* counts the rows of all input files, from 0: users see it in ``rejected.parquet`` and
``results.parquet``. A *place* counts the accepted requests in the order of computation: it indexes
``RequestTable.requests`` and ``RequestTable.rows``, and shards are ranges of places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType, cast

Row = NewType("Row", int)
"""Number of a row over all the input files, from 0."""
Place = NewType("Place", int)
"""Index among the accepted requests."""


def places_from(start: int, stop: int) -> Sequence[Place]:
    """The places ``start`` (included) to ``stop`` (excluded)."""
    return cast(Sequence[Place], range(start, stop))
