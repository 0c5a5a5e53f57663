"""Names of entities: a table of all labels on disk, of which only those in use are looked up."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import readable
from pipeline.errors import FactDumpError
from pipeline.storage import parquet_footer, read_batches

SCHEMA = pa.schema([("id", pa.int64()), ("label", pa.string())])
ROWS = 65_536
_FEW = 1 << 20


class LabelWriter:
    """Writes labels to a Parquet file, in batches."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._ids: list[int] = []
        self._labels: list[str] = []

    def add(self, number: int, label: str) -> None:
        """Add the label of an entity."""
        self._ids.append(number)
        self._labels.append(label)
        if len(self._ids) == ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is still in memory."""
        if self._ids:
            self._writer.write_table(pa.table([self._ids, self._labels], schema=SCHEMA))
        self._ids, self._labels = [], []


class Wanted:
    """Collects the numbers of entities whose names are needed; 8 bytes for each distinct one."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []

    def add(self, numbers: pa.Array) -> None:
        """Add numbers; null is skipped."""
        self._waiting.append(np.unique(numbers.drop_null().to_numpy(zero_copy_only=False)))
        if sum(map(len, self._waiting)) > max(_FEW, len(self._sorted)):
            self.sorted()

    def sorted(self) -> np.ndarray:
        """(n,) int64: the distinct numbers, ascending."""
        self._sorted = np.unique(np.concatenate([self._sorted, *self._waiting]))
        self._waiting.clear()
        return self._sorted


class Names:
    """The names of some entities: texts in a file on the local disk, 20 bytes each in memory.

    Use it in a ``with`` block, which deletes the file at the end.
    """

    def __init__(self, wanted: np.ndarray) -> None:
        """Start without names.

        Args:
            wanted: (n,) int64, distinct and ascending: the entities whose names are kept.
        """
        self._wanted = wanted
        self._starts = np.zeros(len(wanted), np.int64)
        self._lengths = np.full(len(wanted), -1, np.int32)
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "names"
        self._path.touch()
        self._size = 0

    def __enter__(self) -> Names:
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def add(self, tables: Iterable[pa.Table | pa.RecordBatch]) -> None:
        """Keep the wanted names of tables with ``id`` and ``label``; later ones replace earlier."""
        with self._path.open("ab") as file:
            for table in tables:
                places, found = self._places(table.column("id"))
                texts = table.column("label").filter(pa.array(found)).cast(pa.large_binary())
                texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
                offsets, data = _content(texts)
                self._starts[places] = self._size + offsets[:-1] - offsets[0]
                self._lengths[places] = np.diff(offsets)
                file.write(data[offsets[0] : offsets[-1]].data)
                self._size += int(offsets[-1] - offsets[0])

    def of(self, numbers: pa.Array) -> pa.Array:
        """Return the name of each entity; null if it is null or has no known name."""
        places, found = self._places(numbers)
        known = np.zeros(len(numbers), bool)
        known[found] = self._lengths[places] >= 0
        places = places[self._lengths[places] >= 0]
        lengths = self._lengths[places].astype(np.int64)
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        file = np.memmap(self._path, np.uint8, "r") if self._size else np.zeros(0, np.uint8)
        data = file[np.repeat(self._starts[places], lengths) + within]
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        texts = pa.StringArray.from_buffers(
            len(places), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))
        )
        at = np.cumsum(known) - 1
        return texts.take(pa.array(at, mask=~known))

    def _places(self, numbers: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of each wanted number, and the mask of the numbers that are wanted."""
        if isinstance(numbers, pa.ChunkedArray):
            numbers = numbers.combine_chunks()
        # No entity has the number 0.
        values = numbers.fill_null(0).to_numpy(zero_copy_only=False)
        at = np.searchsorted(self._wanted, values)
        found = np.append(self._wanted, 0)[at] == values
        found &= values != 0
        return at[found], found


def label_tables(url: str) -> Iterable[pa.RecordBatch]:
    """Yield the batches of a label table.

    Raises:
        FactDumpError: the file is not a label table.
        StorageError: it cannot be read.
    """
    schema, _ = parquet_footer(url)
    if not all(
        name in schema.names and schema.field(name).type == SCHEMA.field(name).type
        for name in SCHEMA.names
    ):
        raise FactDumpError(
            f"{url} is not a table of labels; it needs the columns id (int64) and label (text), "
            "as --labels writes them"
        )
    for batch in read_batches(url, SCHEMA.names, ROWS):
        table = readable(pa.Table.from_batches([batch]))
        yield from table.filter(table.column("label").is_valid()).to_batches()


def _content(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets and the bytes of large binary values."""
    if not len(texts):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return ends, np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
