"""Folders that the ``datasets`` library saved: Arrow streams, listed in ``state.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from jobs.facts.lines import reason_of
from pipeline.errors import FactDumpError
from pipeline.storage import Store, opened

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
SPLIT = "split"


def read_saved_dataset(source: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a data set, or of all its splits, with a column ``split``.

    Raises:
        FactDumpError: the folder is incomplete or damaged.
        StorageError: a file cannot be read.
    """
    store = Store(source)
    if store.exists(STATE):
        yield from _batches(store, "")
        return
    names = _read(store, SPLITS).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FactDumpError(f"{store.join(SPLITS)} lists no splits; save the data set again")
    for name in names:
        for batch in _batches(store, f"{name}/"):
            if SPLIT in batch.schema.names:
                yield batch
            else:
                yield batch.append_column(SPLIT, pa.repeat(name, len(batch)))


def _batches(store: Store, folder: str) -> Iterator[pa.RecordBatch]:
    state = _read(store, folder + STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise FactDumpError(
            f"{store.join(folder + STATE)} selects rows by an index, as old versions of datasets "
            "wrote it; save the data set again"
        )
    files = state.get("_data_files")
    if not isinstance(files, list):
        raise FactDumpError(f"{store.join(folder + STATE)} lists no files; save the data set again")
    for file in files:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str):
            raise FactDumpError(f"{store.join(folder + STATE)} has a file without a name")
        yield from _stream(store.join(folder + name))


def _stream(url: str) -> Iterator[pa.RecordBatch]:
    fs, path = opened(url)
    try:
        with fs.open(path, "rb") as stream, pa.ipc.open_stream(stream) as reader:
            yield from reader
    except FileNotFoundError:
        raise FactDumpError(f"{url} is missing; save the data set again") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise FactDumpError(
            f"{url} cannot be read ({reason_of(error)}); save the data set again"
        ) from None


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        value = json.loads(store.read_bytes(name))
    except ValueError as error:
        raise FactDumpError(
            f"{store.join(name)} is not JSON ({error}); save the data set again"
        ) from None
    if not isinstance(value, dict):
        raise FactDumpError(f"{store.join(name)} is not an object; save the data set again")
    return value
