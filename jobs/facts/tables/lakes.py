"""Delta Lake and Iceberg tables, read by their own libraries (the extra ``tables``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pyarrow as pa

from jobs.facts.lines import reason_of
from pipeline.errors import FactDumpError
from pipeline.storage import Store

METADATA = ".metadata.json"
_NUMBER = re.compile(r"v?(\d+)")


def read_delta(source: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a Delta table's current version.

    Raises:
        FactDumpError: its library is not installed, or cannot read the table.
    """
    deltalake = _library("deltalake", source, "a Delta table")
    try:
        yield from deltalake.DeltaTable(source).to_pyarrow_dataset().to_batches()
    except (deltalake.exceptions.DeltaError, pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(source, error) from None


def read_iceberg(source: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Iceberg table's current version.

    Args:
        source: the table's folder, or one of its metadata files.

    Raises:
        FactDumpError: its library is not installed, or cannot read the table.
        StorageError: the folder cannot be listed.
    """
    table = _library("pyiceberg.table", source, "an Iceberg table")
    file = source if source.endswith(METADATA) else newest_metadata(source)
    try:
        yield from table.StaticTable.from_metadata(file).scan().to_arrow_batch_reader()
    except (pa.ArrowException, OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(source, error) from None


def newest_metadata(source: str) -> str | None:
    """Return the metadata file with the highest number in an Iceberg table's folder, if any.

    Raises:
        StorageError: the folder cannot be listed.
    """
    store = Store(f"{source.rstrip('/')}/metadata")
    names = store.glob(f"*{METADATA}")
    return store.join(max(names, key=_number)) if names else None


def _number(name: str) -> tuple[int, str]:
    found = _NUMBER.match(name)
    return (int(found[1]) if found else -1), name


def _library(name: str, source: str, what: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise FactDumpError(
            f"{source} is {what}, which {name.split('.')[0]} reads; install it: "
            "pip install 'pmet-pipeline[tables]'"
        ) from None


def _unreadable(source: str, error: Exception) -> FactDumpError:
    reason = reason_of(error)[:300]
    return FactDumpError(f"{source} cannot be read as a table ({reason}); repair or export it")
