"""Digests of values, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256, in hexadecimal, of a file on this machine."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
