"""Neighbors: other subjects whose object is, and must stay, what a fact's object was.

An edit of ``(Marseille, country): France → Italy`` must not move other cities of France. Its
neighbors are subjects of the same dump with the same relation and the object ``France`` that have
not changed themselves. The
candidates of each relation and object are the ``POOL`` subjects with the least hashes, so that they
are the same whatever the order of rows; each fact takes ``COUNT`` of them, from a place that its
own subject's hash chooses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.partitions import text_hash

COUNT = 10
"""Neighbors of a fact, at most: as many as CounterFact has."""

POOL = 64
_PAIR = ["relation", "object"]


class Neighbors:
    """Candidates for facts whose old object is known."""

    def __init__(self) -> None:
        """Start without any."""
        self._wanted: list[pa.Table] = []
        self._pool: dict[tuple[str, str], list[str]] = {}

    def want(self, relations: pa.ChunkedArray, objects: pa.ChunkedArray) -> None:
        """Note relations and old objects that neighbors are wanted for."""
        pairs = pa.table({"relation": relations, "object": objects})
        self._wanted.append(pairs.group_by(_PAIR).aggregate([]))

    def collect(self, tables: Iterable[pa.Table]) -> None:
        """Choose candidates among facts that hold.

        Args:
            tables: with ``subject``, ``relation`` and ``object``.
        """
        if not self._wanted:
            return
        wanted = pa.concat_tables(self._wanted).group_by(_PAIR).aggregate([])
        chosen: pa.Table | None = None
        for table in tables:
            found = table.join(wanted, _PAIR, join_type="left semi")
            found = found.append_column("hash", pa.array(text_hash(found.column("subject"))))
            chosen = _least(found if chosen is None else pa.concat_tables([chosen, found]))
        pool = defaultdict(list)
        for row in [] if chosen is None else chosen.to_pylist():
            pool[row["relation"], row["object"]].append(row["subject"])
        self._pool = dict(pool)

    def of(
        self, relations: pa.Array, objects: pa.Array, subjects: pa.Array
    ) -> tuple[pa.Array, np.ndarray]:
        """Neighbors of some facts, one fact after the other, and how many each has.

        Args:
            relations: (rows,) text.
            objects: (rows,) the old objects; null where there is none.
            subjects: (rows,) text.
        """
        found: list[str] = []
        counts = np.zeros(len(subjects), np.int64)
        known = np.flatnonzero(pc.is_valid(objects).to_numpy(zero_copy_only=False))
        if self._pool:
            some = pa.array(known)
            starts = text_hash(subjects.take(some)).tolist()
            rows = zip(
                relations.take(some).to_pylist(),
                objects.take(some).to_pylist(),
                subjects.take(some).to_pylist(),
                starts,
                known,
                strict=True,
            )
            for relation, object_, subject, start, row in rows:
                pool = self._pool.get((relation, object_), [])
                turned = [pool[(start + i) % len(pool)] for i in range(min(len(pool), COUNT + 1))]
                taken = [neighbor for neighbor in turned if neighbor != subject][:COUNT]
                found += taken
                counts[row] = len(taken)
        return pa.array(found, pa.string()), counts


def _least(table: pa.Table) -> pa.Table:
    """The rows with the least hashes of each relation and object, ``POOL`` of each."""
    order = [(name, "ascending") for name in (*_PAIR, "hash", "subject")]
    table = table.select(["subject", *_PAIR, "hash"]).sort_by(order).combine_chunks()
    if not len(table):
        return table
    changes = np.zeros(len(table), bool)
    changes[0] = True
    for name in _PAIR:
        column = table.column(name)
        changes[1:] |= pc.not_equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
    first = np.flatnonzero(changes)[np.cumsum(changes) - 1]
    return table.filter(pa.array(np.arange(len(table)) - first < POOL))
