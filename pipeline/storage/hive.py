"""Folders whose names hold column values, as in Hive and Spark: ``relation=capital/x.parquet``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from pipeline.storage.store import Store, expand

_NULL = "__HIVE_DEFAULT_PARTITION__"

Columns = dict[str, str | None]
"""Values by column; None if the folder stands for null."""


def expand_with_columns(patterns: str | Sequence[str], *, deep: bool = False) -> dict[str, Columns]:
    """Return each file once, in order, with the columns in its folder names.

    Args:
        patterns: paths, URLs, globs or folders, as for ``expand``.
        deep: a folder stands for all Parquet files below it, whatever its subfolders are called.

    Raises:
        RequestTableError: a pattern matches no file.
        StorageError: the storage cannot be listed.
    """
    found: dict[str, Columns] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for url in expand(pattern, deep=deep):
            found.setdefault(url, _columns(url, pattern))
    return found


def _columns(url: str, pattern: str) -> Columns:
    """Columns in folder names that the pattern does not spell out."""
    spelled = re.split(r"[*?\[]", pattern, maxsplit=1)
    fixed = spelled[0] if len(spelled) == 1 else spelled[0].rpartition("/")[0] or "."
    below = url.removeprefix(Store(fixed).url).split("/")[:-1]
    pairs = (folder.partition("=") for folder in below if "=" in folder)
    return {name: None if value == _NULL else unquote(value) for name, _, value in pairs}
