"""Numbered files, ``000003.json``: creating the next one claims it; the highest number counts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import PurePosixPath

from pipeline.storage.store import Store


def numbered(folder: str, number: int) -> str:
    """The file name for a number in a folder."""
    return f"{folder}/{number:06d}.json"


def last_number(store: Store, folder: str) -> int:
    """The highest file number in a folder; 0 if there is none."""
    stems = (PurePosixPath(name).stem for name in store.list(folder))
    return max((int(stem) for stem in stems if stem.isdecimal()), default=0)


def now_text() -> str:
    """The current time as these files and run records write it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
