"""Single files that a command writes where the user says: it replaces only files of its own.

A file that is there already is replaced if this project wrote it, which shows in its content. Any
other is the user's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.storage.overlap import locate
from pipeline.storage.store import Store

PARQUET_MARK = {"pmet": "edit requests or facts"}
"""What Parquet files of ours hold among their key-value metadata."""


def refuse_foreign_file(store: Store, name: str, is_own: Callable[[Store, str], bool]) -> None:
    """Refuse to replace a file that this project has not written.

    Args:
        store: the folder.
        name: of the file that is going to be written.
        is_own: whether the content of an existing file shows that it is ours.

    Raises:
        OutputError: there is a file of somebody else, or a folder.
        StorageError: it cannot be read.
    """
    if store.exists(name) and not is_own(store, name):
        raise OutputError(
            f"{store.join(name)} is there already and was not written by this command; name "
            "another file, or move it elsewhere"
        )


def refuse_input(output: str, inputs: Iterable[str]) -> None:
    """Refuse an output that is one of the files that are read, whatever their paths look like.

    Raises:
        OutputError: naming both.
        StorageError: no file system reads such a URL.
    """
    target = locate(output)[0]
    for url in inputs:
        if any(place.holds(target) and target.holds(place) for place in locate(url)):
            raise OutputError(
                f"{output} is one of the files that are read ({url}); write to another one"
            )


def is_marked_parquet(store: Store, name: str) -> bool:
    """Whether a file is Parquet and carries `PARQUET_MARK`."""
    try:
        with store.read_stream(name) as stream:
            metadata = pq.read_metadata(stream).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return all(metadata.get(k.encode()) == v.encode() for k, v in PARQUET_MARK.items())


def holds_text(*texts: str) -> Callable[[Store, str], bool]:
    """A check whether a file holds one of these texts, which only we write."""
    wanted = [text.encode() for text in texts]

    def check(store: Store, name: str) -> bool:
        content = store.read_bytes(name)
        return any(text in content for text in wanted)

    return check


def is_json_with(*keys: str) -> Callable[[Store, str], bool]:
    """A check whether a file is a JSON object with these keys, as what we write is."""

    def check(store: Store, name: str) -> bool:
        try:
            value = json.loads(store.read_bytes(name))
        except ValueError:
            return False
        return isinstance(value, dict) and all(key in value for key in keys)

    return check
