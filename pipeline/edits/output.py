"""The folder that an edited checkpoint or an export is written to: one that holds nothing else.

A note that lists the files to come is written first. It distinguishes a folder that a killed
command left from a user's, so that the same command can start over in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from uuid import uuid4

from pipeline.edits.carried import FOLDER
from pipeline.errors import FolderBusyError, OutputError
from pipeline.run_folder import is_unfinished
from pipeline.storage import Store

_NOTE = f"{FOLDER}/writing.json"
_SHOWN = 3


def refuse_used(store: Store) -> None:
    """Refuse a folder that holds anything but what a killed command left.

    Raises:
        OutputError: naming some of the files.
        StorageError: the folder cannot be read.
    """
    if store.is_file():
        raise OutputError(f"{store.url} is a file; name a folder")
    entries = store.entries()
    if not entries:
        return
    if not store.exists(_NOTE):
        raise OutputError(f"{store.url} holds {_some(entries)}; {_REMEDY}")
    ours = _names(store)
    foreign = [name for name in store.list(unfinished=True) if not _is_ours(name, ours)]
    if foreign:
        raise OutputError(
            f"{store.url} holds {_some(foreign)} beside what a killed command left; {_REMEDY}"
        )


_REMEDY = "name a folder that is empty or does not exist"


def claim(store: Store, names: Collection[str], last: str = "config.json") -> str:
    """Take a folder to write these files to, and delete what a killed command left there.

    Args:
        store: the folder.
        names: the files.
        last: the one that is written last, without which nothing opens the folder.

    Returns:
        What `check_claim` needs.

    Raises:
        OutputError: as `refuse_used`.
        StorageError: it cannot be written to.
    """
    refuse_used(store)
    left = store.list(unfinished=True) if store.entries() else []
    earlier = _names(store) if left else set()
    token = uuid4().hex
    store.write_json(_NOTE, {"token": token, "names": sorted({*earlier, *names})})
    # First of all, what makes the folder look finished.
    store.delete(last)
    store.delete_files(name for name in left if name != _NOTE)
    return token


def check_claim(store: Store, token: str) -> None:
    """Raise if another process has taken the folder since.

    Raises:
        FolderBusyError: it has.
    """
    if not store.exists(_NOTE) or store.read_json(_NOTE).get("token") != token:
        raise FolderBusyError(
            f"another command has begun to write to {store.url}; wait until it ends, or name "
            "another folder"
        )


def is_claimed(store: Store) -> bool:
    """Whether a command is writing to a folder, or was killed while it did."""
    return store.exists(_NOTE)


def release(store: Store) -> None:
    """Mark the folder as finished."""
    store.delete_files([_NOTE])


def _names(store: Store) -> set[str]:
    try:
        return set(json.loads(store.read_bytes(_NOTE))["names"])
    except (ValueError, KeyError, TypeError):
        raise OutputError(
            f"{store.join(_NOTE)} is damaged, so it is unknown whose files {store.url} holds; "
            f"{_REMEDY}"
        ) from None


def _is_ours(name: str, ours: Collection[str]) -> bool:
    return name in ours or name.startswith(f"{FOLDER}/") or is_unfinished(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
