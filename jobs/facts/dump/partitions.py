"""Partitions facts by hash: rows with the same subject and relation land in one partition.

A small dump stays in memory. A large one goes to files on the local disk, which are read back one
partition at a time. The hash of the texts' normal form (`pipeline.data.normalization`) only selects
the partition: within it the texts themselves are compared, so two facts are never confused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.data import normal_column

PARTITION_ROWS = 400_000
MOST_PARTITIONS = 100
"""Maximum number of partitions: each is an open file while facts are added, per dump."""

_ODD = np.uint64(0x9E3779B97F4A7C15)


class Partitions:
    """Tables of facts, partitioned by a hash of subject and relation.

    Use it in a ``with`` block, which deletes its files at the end.
    """

    def __init__(self, count: int) -> None:
        """Start with ``count`` empty partitions."""
        self.count = count
        self._kept: list[pa.Table] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._sinks: list[tuple[pa.OSFile, pa.RecordBatchWriter]] = []

    def __enter__(self) -> Partitions:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, facts: pa.Table) -> None:
        """Add rows to their partitions.

        Args:
            facts: rows with ``subject`` and ``relation``, neither null nor empty; all calls have
                the same columns.
        """
        if self.count == 1:
            self._kept.append(facts)
            return
        if self._folder is None:
            self._open(facts.schema)
        numbers = (pair_hash(facts) % np.uint64(self.count)).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        sorted_facts = facts.take(pa.array(order))
        bounds = np.searchsorted(numbers[order], np.arange(self.count + 1))
        for index, (_, writer) in enumerate(self._sinks):
            start, stop = int(bounds[index]), int(bounds[index + 1])
            if stop > start:
                writer.write_table(sorted_facts.slice(start, stop - start).combine_chunks())

    def tables(self) -> Iterator[pa.Table | None]:
        """Yield the partitions in order, each with its rows in the order added; None if empty."""
        self._close()
        for index in range(self.count):
            yield self._table(index)

    def _table(self, index: int) -> pa.Table | None:
        if self.count == 1:
            return pa.concat_tables(self._kept) if self._kept else None
        if self._folder is None:
            return None
        with pa.OSFile(f"{self._folder.name}/{index}") as file:
            return pa.ipc.open_stream(file).read_all()

    def _open(self, schema: pa.Schema) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for index in range(self.count):
            file = pa.OSFile(f"{self._folder.name}/{index}", "wb")
            self._sinks.append((file, pa.ipc.new_stream(file, schema)))

    def _close(self) -> None:
        for file, writer in self._sinks:
            writer.close()
            file.close()
        self._sinks.clear()


def partition_count(rows: int) -> int:
    """Return the number of partitions for a number of rows; it depends on nothing else."""
    return min(max(1, -(-rows // PARTITION_ROWS)), MOST_PARTITIONS)


def pair_hash(facts: pa.Table) -> np.ndarray:
    """(rows,) uint64: a hash of subject and relation in normal form, the same on every machine."""
    texts = (facts.column(name).combine_chunks() for name in ("subject", "relation"))
    subject, relation = (text_hash(normal_column(text)) for text in texts)
    return _mixed(subject * _ODD + relation)


def text_hash(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(rows,) uint64: Σ (byteᵢ + 1)·oddⁱ mod 2⁶⁴ of each text, mixed.

    Texts are neither null nor empty. Texts crafted to collide merely share a partition.
    """
    text = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not len(text):
        return np.zeros(0, np.uint64)
    _, offsets_buffer, data = text.cast(pa.large_binary()).buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[text.offset : text.offset + len(text) + 1]
    content = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
    starts = offsets[:-1] - offsets[0]
    lengths = np.diff(offsets)
    places = np.arange(len(content)) - np.repeat(starts, lengths)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(int(lengths.max()), _ODD), dtype=np.uint64)
        return _mixed(np.add.reduceat((content + np.uint64(1)) * powers[places], starts))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread the high bits over all bits (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
