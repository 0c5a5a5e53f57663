"""Where conversions go: edit requests, and beside them the rows that became none."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.facts.diff import SCHEMA, DumpDiff
from pipeline.data import readable, with_columns
from pipeline.errors import FactDumpError
from pipeline.storage import (
    PARQUET_MARK,
    Store,
    is_marked_parquet,
    refuse_foreign_file,
    refuse_input,
)

REJECTED_FOLDER = "rejected"


@dataclass(frozen=True)
class Conversion:
    """What became of the rows.

    Attributes:
        format: what was read.
        rows: all of them; each is converted, unchanged or rejected.
        converted: rows that are edit requests now.
        unchanged: rows left out because the previous dump holds the same fact.
        rejected: how many were rejected for what kind of reason.
        output: the file of edit requests.
        rejected_output: the file of rejected rows, with ``row`` and ``reason``.
        left_out: null and empty texts that were left out of requests.
    """

    format: str
    rows: int
    converted: int
    unchanged: int
    rejected: Mapping[str, int]
    output: str
    rejected_output: str
    left_out: int = 0


class Outputs:
    """Writes edit requests and rejected rows, batch by batch.

    Attributes:
        converted: edit requests so far.
        rejected: rejected rows so far.
    """

    def __init__(self, requests: BinaryIO, rejected: BinaryIO) -> None:
        self.converted = self.rejected = 0
        self._requests, self._rejected = _Sink(requests), _Sink(rejected)

    def write(
        self,
        requests: pa.Table,
        rejected: pa.Table,
        reasons: pa.Array,
        rows: Sequence[int] | np.ndarray,
    ) -> None:
        """Write a batch; every one has the same columns.

        Args:
            requests: edit requests.
            rejected: other rows, as they were read.
            reasons: why each of these was rejected.
            rows: (rejected,) int64, their numbers.
        """
        self.converted += len(requests)
        self.rejected += len(rejected)
        self._requests.write(requests)
        columns = {"row": pa.array(rows, pa.int64()), "reason": reasons}
        self._rejected.write(with_columns(readable(rejected), columns))

    def close(self) -> None:
        """Write the footers."""
        self._requests.close()
        self._rejected.close()


class _Sink:
    """A Parquet file whose columns the first batch decides."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, table.schema, compression="zstd")
        if len(table):
            self._writer.write_table(table)

    def close(self) -> None:
        assert self._writer is not None, "something was written"
        self._writer.add_key_value_metadata(PARQUET_MARK)
        self._writer.close()


def output_urls(url: str, inputs: Collection[str]) -> tuple[str, str]:
    """The files that are written: edit requests, and rejected rows.

    The rejected rows go to a folder beside the requests, where neither the folder of the requests
    nor a glob such as ``*.parquet`` finds them.

    Raises:
        FactDumpError: there is no file name in ``url``.
        OutputError: one of the two is among the ``inputs``, or a file of the user's.
        StorageError: what is there cannot be read.
    """
    store, name = _place(url)
    names = name, f"{REJECTED_FOLDER}/{name}"
    for output in names:
        refuse_input(store.join(output), inputs)
        refuse_foreign_file(store, output, is_marked_parquet)
    return store.join(names[0]), store.join(names[1])


def refuse_among(url: str, sources: Iterable[str]) -> None:
    """Refuse to write where a folder or a glob that is read would find the file the next time.

    Raises:
        FactDumpError: naming both.
    """
    store, name = _place(url)
    output = store.join(name)
    for source in sources:
        read = Store(source).url
        found = output.startswith(f"{read}/") or PurePosixPath(output).match(read)
        if found and output != read:
            raise FactDumpError(
                f"{url} would be read as a part of {source} the next time; write it elsewhere"
            )


@contextmanager
def open_outputs(url: str, *, may_be_none: bool = False) -> Iterator[Outputs]:
    """Write both files; they appear when the block has ended well, the requests last.

    Args:
        url: the file of edit requests.
        may_be_none: whether it is well that there is none.

    Raises:
        FactDumpError: no row was converted and it is not well; then the rejected rows are written
            all the same, and what was at ``url`` stays.
    """
    store, name = _place(url)
    rejected_name = f"{REJECTED_FOLDER}/{name}"
    with store.write_stream(name) as requests:
        with store.write_stream(rejected_name) as rejected:
            outputs = Outputs(requests, rejected)
            yield outputs
            outputs.close()
        if not (outputs.converted or may_be_none):
            raise FactDumpError(
                f"none of {outputs.rejected:,} rows can be converted; the reasons are in "
                f"{store.join(rejected_name)}"
            )


def write_diff(diff: DumpDiff, url: str, inputs: Collection[str] = ()) -> str:
    """Write the facts that differ to a Parquet file; returns its path or URL.

    Raises:
        FactDumpError: there is no file name in ``url``.
        OutputError: it is among the ``inputs``, or a file of the user's.
        StorageError: it cannot be written.
    """
    output_urls(url, inputs)
    store, name = _place(url)
    with (
        store.write_stream(name) as stream,
        pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer,
    ):
        for batch in diff.batches():
            writer.write_batch(batch)
        writer.add_key_value_metadata(PARQUET_MARK)
    return store.join(name)


def _place(url: str) -> tuple[Store, str]:
    folder, slash, name = url.rpartition("/")
    if name in ("", ".", ".."):
        raise FactDumpError(f"{url!r} names no file to write; name one, as requests.parquet")
    # What a URL without folders, as memory://name, and a file of the root have before the name.
    root = f"{folder}/" if folder.endswith(":/") or (slash and not folder) else folder
    return Store(root or "."), name
