"""Segments: immutable Parquet files named by their content.

Findings shared by many runs are kept as segments, in one folder per *context*: everything that the
findings depend on apart from their subject. Any number of runs may write at the same time, and a
killed run leaves only whole segments.

    <context>/context.json        the value whose digest is the folder's name
    <context>/<sha256>.parquet    a segment
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.storage.digest import digest_of
from pipeline.storage.store import Store

_SEGMENT = ".parquet"


class Segments:
    """The segments of one context.

    Args:
        store: the folder of all contexts.
        setting: the job setting that names this folder, for messages.
        context: the context as a JSON value.

    Attributes:
        digest: SHA-256 of the context, the name of its folder.
    """

    def __init__(self, store: Store, setting: str, context: dict[str, Any]) -> None:
        self._store, self._setting, self._context = store, setting, context
        self.digest = digest_of(context)

    def names(self) -> list[str]:
        """The names of all segments, sorted."""
        return [name for name in self._store.list(self.digest) if name.endswith(_SEGMENT)]

    def write(self, table: pa.Table) -> None:
        """Store a table as a segment.

        Raises:
            StorageError: it cannot be written.
        """
        sink = BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue()
        # All writers write the same content.
        if not self._store.exists(said := f"{self.digest}/context.json"):
            self._store.write_json(said, self._context)
        name = f"{self.digest}/{hashlib.sha256(data).hexdigest()}{_SEGMENT}"
        self._store.write_bytes(name, data)

    @contextmanager
    def reading(self, names: Sequence[str]) -> Iterator[None]:
        """If reading in the block fails, find the segment whose content does not match its name.

        Raises:
            StorageError: reading failed.
        """
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            store = self._store
            damaged = [n for n in names if store.sha256(n) != PurePosixPath(n).stem]
            where = store.join(*damaged[:1] or [self.digest])
            remedy = "delete the file" if damaged else "check that the storage can be reached"
            reason = " ".join(str(error).split())
            raise StorageError(
                f"{self._setting}: {where} cannot be read ({reason}); {remedy} and run again"
            ) from error
