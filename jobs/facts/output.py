"""Output files of conversions: edit requests, and the rejected rows beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """The outcome of a conversion.

    Attributes:
        format: format of the input.
        rows: number of rows; each is converted, unchanged or rejected.
        converted: number of rows converted to edit requests.
        unchanged: number of rows skipped because the previous dump holds the same fact.
        rejected: number of rejected rows by kind of reason.
        output: file of edit requests.
        rejected_output: file of rejected rows, with ``row``, ``code`` and ``reason``.
        left_out: number of null and empty texts left out of requests.
        notes: other counts, by what they count.
    """

    format: str
    rows: int
    converted: int
    unchanged: int
    rejected: Mapping[str, int]
    output: str
    rejected_output: str
    left_out: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)


class Outputs:
    """Writes edit requests and rejected rows, batch by batch.

    Attributes:
        converted: number of edit requests so far.
        rejected: number of rejected rows so far.
    """

    def __init__(self, requests: BinaryIO, rejected: BinaryIO) -> None:
        self.converted = self.rejected = 0
        self._requests, self._rejected = _Sink(requests), _Sink(rejected)

    def write(
        self,
        requests: pa.Table,
        rejected: pa.Table,
        codes: pa.Array,
        reasons: pa.Array,
        rows: Sequence[int] | np.ndarray,
    ) -> None:
        """Write a batch; all batches have the same columns.

        Args:
            requests: edit requests.
            rejected: rejected rows, as read.
            codes: why each rejected row was rejected, for programs.
            reasons: the same in a sentence, for people.
            rows: (rejected,) int64, the row numbers.
        """
        self.converted += len(requests)
        self.rejected += len(rejected)
        self._requests.write(requests)
        columns = {"row": pa.array(rows, pa.int64()), "code": codes, "reason": reasons}
        self._rejected.write(with_columns(readable(rejected), columns))

    def close(self) -> None:
        """Write the footers."""
        self._requests.close()
        self._rejected.close()


class _Sink:
    """A Parquet file whose columns are those of the first batch."""

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
    """Return the output files: edit requests and rejected rows.

    The rejected rows go to a subfolder beside the requests, out of reach of a glob such as
    ``*.parquet``.

    Raises:
        FactDumpError: ``url`` has no file name.
        OutputError: one of the two is among the ``inputs``, or is a file that pmet did not write.
        StorageError: an existing file cannot be read.
    """
    store, name = _place(url)
    names = name, f"{REJECTED_FOLDER}/{name}"
    for output in names:
        refuse_input(store.join(output), inputs)
        refuse_foreign_file(store, output, is_marked_parquet)
    return store.join(names[0]), store.join(names[1])


def refuse_among(url: str, sources: Iterable[str]) -> None:
    """Refuse an output that an input folder or glob would match on the next read.

    Raises:
        FactDumpError: the output and the input that would match it.
    """
    store, name = _place(url)
    output = store.join(name)
    for source in sources:
        read = Store(source).url
        found = output.startswith(f"{read}/") or PurePosixPath(output).match(read)
        if found and output != read:
            raise FactDumpError(
                f"{url} would be read as part of {source} next time; write it elsewhere"
            )


@contextmanager
def open_outputs(url: str, *, may_be_none: bool = False) -> Iterator[Outputs]:
    """Write both files; they appear when the block ends without an error, the requests last.

    Args:
        url: the file of edit requests.
        may_be_none: accept that there are no requests.

    Raises:
        FactDumpError: no row was converted and ``may_be_none`` is false. The rejected rows are
            still written, and the file at ``url`` is left as it was.
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
        FactDumpError: ``url`` has no file name.
        OutputError: the file is among the ``inputs``, or pmet did not write it.
        StorageError: the file cannot be written.
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
        raise FactDumpError(f"{url!r} has no file name; add one, such as requests.parquet")
    # What precedes the name in a URL without folders (memory://name) or a file in the root.
    root = f"{folder}/" if folder.endswith(":/") or (slash and not folder) else folder
    return Store(root or "."), name
