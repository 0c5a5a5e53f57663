"""Neighbors: other subjects that have, and must keep, the object that a fact had before.

An edit of ``(Marseille, country): France → Italy`` must not move other cities of France. Its
neighbors are unchanged subjects of the same dump with the same relation and the object ``France``.
The candidates for each relation and object are the ``POOL`` subjects with the smallest hashes, so
they do not depend on the order of rows. Each fact takes ``COUNT`` consecutive candidates, starting
at a place chosen by the hash of its own subject.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.partitions import text_hash
from jobs.facts.dump.runs import places_in_runs

COUNT = 10
"""Maximum number of neighbors per fact, as in CounterFact."""

POOL = 64
KEPT_ROWS = 500_000
"""Number of candidates to buffer before the best are selected again."""


class Neighbors:
    """Collects neighbor candidates for facts whose old object is known."""

    def __init__(self) -> None:
        """Start with no candidates."""
        self._wanted: list[pa.ChunkedArray] = []
        self._pairs = pa.array([], pa.string())
        self._first = self._counts = np.zeros(0, np.int64)
        self._subjects = pa.array([], pa.string())

    def want(self, relations: pa.ChunkedArray, objects: pa.ChunkedArray) -> None:
        """Add relations and old objects that need neighbors."""
        self._wanted.append(pc.unique(_pair(relations, objects)))

    def collect(self, tables: Iterable[pa.Table]) -> None:
        """Select candidates.

        Args:
            tables: valid, unchanged facts with ``subject``, ``relation``, ``object``.
        """
        wanted = pc.unique(pa.chunked_array(self._wanted, pa.string()))
        best, waiting = _candidates(pa.array([], pa.string()), pa.array([], pa.string())), []
        for table in tables:
            pairs = _pair(table.column("relation"), table.column("object"))
            found = pc.is_in(pairs, wanted)
            waiting.append(_candidates(pairs.filter(found), table.column("subject").filter(found)))
            # Selecting only when the buffer is full keeps the number of sorts small.
            if sum(map(len, waiting)) > max(KEPT_ROWS, len(best)):
                best, waiting = _least([best, *waiting]), []
        best = _least([best, *waiting])
        self._subjects = best.column("subject").combine_chunks()
        self._first = np.flatnonzero(_opens(best))
        self._pairs = best.column("pair").combine_chunks().take(pa.array(self._first))
        self._counts = np.diff(np.append(self._first, len(best)))

    def of(
        self, relations: pa.Array, objects: pa.Array, subjects: pa.Array
    ) -> tuple[pa.Array, np.ndarray]:
        """Return the neighbors of some facts, concatenated, and the number for each fact.

        Args:
            relations: (rows,) text.
            objects: (rows,) the old objects; null if there is none.
            subjects: (rows,) text. No subject is its own neighbor, because it has changed.
        """
        pairs = pc.index_in(_pair(relations, objects), self._pairs, skip_nulls=True)
        rows = np.flatnonzero(pc.is_valid(pairs).to_numpy(zero_copy_only=False))
        pools = pairs.take(pa.array(rows)).to_numpy(zero_copy_only=False)
        sizes = self._counts[pools]
        taken = np.minimum(sizes, COUNT)
        starts = text_hash(subjects.take(pa.array(rows))) % sizes.astype(np.uint64)
        turn = places_in_runs(taken)
        turn = (np.repeat(starts.astype(np.int64), taken) + turn) % np.repeat(sizes, taken)
        counts = np.zeros(len(subjects), np.int64)
        counts[rows] = taken
        return self._subjects.take(pa.array(np.repeat(self._first[pools], taken) + turn)), counts


def _pair(
    relations: pa.Array | pa.ChunkedArray, objects: pa.Array | pa.ChunkedArray
) -> pa.Array | pa.ChunkedArray:
    """Return a text that is unique to each relation and object; null if either is null."""
    # The length prefix marks where the relation ends.
    lengths = pc.utf8_length(relations).cast(pa.string())
    return pc.binary_join_element_wise(lengths, relations, objects, ":")


def _candidates(
    pairs: pa.Array | pa.ChunkedArray, subjects: pa.Array | pa.ChunkedArray
) -> pa.Table:
    columns = {"pair": pairs, "hash": pa.array(text_hash(subjects)), "subject": subjects}
    return pa.table(columns)


def _least(tables: list[pa.Table]) -> pa.Table:
    """Return the ``POOL`` candidates with the smallest hashes for each pair, sorted."""
    order = [(name, "ascending") for name in ("pair", "hash", "subject")]
    table = pa.concat_tables(tables).sort_by(order).combine_chunks()
    opens = _opens(table)
    first = np.flatnonzero(opens)[np.cumsum(opens) - 1]
    return table.filter(pa.array(np.arange(len(table)) - first < POOL))


def _opens(table: pa.Table) -> np.ndarray:
    """(rows,) bool: where a new pair begins."""
    pairs = table.column("pair")
    changes = pc.not_equal(pairs[1:], pairs[:-1]).to_numpy() if len(table) else []
    return np.append(np.ones(min(1, len(table)), bool), changes).astype(bool)
