"""Single output files of commands at paths the user gives: they replace only our own files.

An existing file is replaced if this project wrote it, which its content shows. Any other file
belongs to the user.
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
"""The key-value metadata that marks Parquet files written by this project."""


def refuse_foreign_file(store: Store, name: str, is_own: Callable[[Store, str], bool]) -> None:
    """Refuse to replace a file that this project did not write.

    Args:
        store: the folder.
        name: name of the file about to be written.
        is_own: whether an existing file's content shows that it is ours.

    Raises:
        OutputError: a folder, or a file not written by this project, has this name.
        StorageError: it cannot be read.
    """
    if store.exists(name) and not is_own(store, name):
        raise OutputError(
            f"{store.join(name)} already exists and was not written by this command; name "
            "another file, or move it elsewhere"
        )


def refuse_input(output: str, inputs: Iterable[str]) -> None:
    """Refuse an output that is also an input, whatever the paths look like.

    Raises:
        OutputError: naming both.
        StorageError: no file system supports such a URL.
    """
    target = locate(output)[0]
    for url in inputs:
        if any(place.holds(target) and target.holds(place) for place in locate(url)):
            raise OutputError(f"{output} is one of the input files ({url}); write to another one")


def is_marked_parquet(store: Store, name: str) -> bool:
    """Whether a file is Parquet and carries `PARQUET_MARK`."""
    try:
        with store.read_stream(name) as stream:
            metadata = pq.read_metadata(stream).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return all(metadata.get(k.encode()) == v.encode() for k, v in PARQUET_MARK.items())


def holds_text(*texts: str) -> Callable[[Store, str], bool]:
    """Return a check whether a file holds one of these texts, which only our files hold."""
    wanted = [text.encode() for text in texts]

    def check(store: Store, name: str) -> bool:
        content = store.read_bytes(name)
        return any(text in content for text in wanted)

    return check


def is_json_with(*keys: str) -> Callable[[Store, str], bool]:
    """Return a check whether a file is a JSON object with these keys, as our files are."""

    def check(store: Store, name: str) -> bool:
        try:
            value = json.loads(store.read_bytes(name))
        except ValueError:
            return False
        return isinstance(value, dict) and all(key in value for key in keys)

    return check
