"""Reading Parquet in pieces, from anywhere, with only the requested parts in memory.

Columns are returned in plain types, not as dictionaries or views. A damaged index is detected here,
where the file can still be named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.storage.store import failures, opened

_ROWS_AT_ONCE = 256


def map_parquet(url: str) -> pa.Table:
    """Decode a Parquet file from anywhere to the local disk, and map it into memory.

    The table's pages are loaded and dropped as they are read; the file behind it has no name, and
    disappears with the table.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    fs, path = opened(url)
    with tempfile.TemporaryDirectory() as folder, failures("read", url):
        copy = str(Path(folder) / "decoded.arrow")
        with fs.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            schema = _decoded_schema(file.schema_arrow)
            with pa.OSFile(copy, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in file.iter_batches(_ROWS_AT_ONCE):
                    writer.write_batch(_decoded(batch))
        return pa.ipc.open_file(pa.memory_map(copy)).read_all()


def read_column(url: str, name: str) -> Iterator[list[Any]]:
    """Yield the values of one column of a Parquet file in batches; nothing else is read.

    Raises:
        StorageError: the file cannot be read, is damaged, or has no such column.
    """
    fs, path = opened(url)
    with failures("read", url), fs.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        columns = file.schema_arrow.names
        if name not in columns:
            raise StorageError(f"{url} has no column {name}; it has {', '.join(columns)}")
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[name]):
            yield batch.column(0).to_pylist()


def parquet_footer(url: str) -> tuple[pa.Schema, int]:
    """Return the columns and row count of a Parquet file; nothing else is read.

    Raises:
        StorageError: the file cannot be read or is damaged.
    """
    fs, path = opened(url)
    with failures("read", url), fs.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        return file.schema_arrow.remove_metadata(), file.metadata.num_rows


def read_batches(url: str, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield named columns of a Parquet file in order, at most ``rows`` rows at a time.

    Raises:
        StorageError: the file cannot be read or is damaged; rows before the damage were yielded.
    """
    fs, path = opened(url)
    with failures("read", url), fs.open(path, "rb") as stream:
        batches = pq.ParquetFile(stream).iter_batches(rows, columns=list(columns))
        while (batch := next(batches, None)) is not None:
            yield _decoded(batch)


def plain_type(type_: pa.DataType) -> pa.DataType:
    """The type that a column has after reading: neither a dictionary nor a view."""
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    return pa.large_string() if pa.types.is_string_view(type_) else type_


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [
        column if plain_type(column.type) == column.type else column.cast(plain_type(column.type))
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _decoded_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([(field.name, plain_type(field.type)) for field in schema])
