"""Numbered files, ``000003.json``: who creates the next one has it, and the highest counts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import PurePosixPath

from pipeline.storage.store import Store


def numbered(folder: str, number: int) -> str:
    """The name of a folder's file of a number."""
    return f"{folder}/{number:06d}.json"


def last_number(store: Store, folder: str) -> int:
    """The highest number there is in a folder; 0 without one."""
    stems = (PurePosixPath(name).stem for name in store.list(folder))
    return max((int(stem) for stem in stems if stem.isdecimal()), default=0)


def now_text() -> str:
    """The time as these files and those of a run say it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
