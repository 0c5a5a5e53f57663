"""Detection of other formats than edit requests, with the command that converts them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath

from pipeline.errors import StorageError
from pipeline.storage import read_file

_TEXT_NAMES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
_HEAD = 256
_OF_DATA_SETS = ("requested_rewrite", "src", "alt", "ground_truth", "rephrase_prompt")
_OF_DUMPS = ("subject", "relation", "object")


def is_text(url: str) -> bool:
    """Whether a file is CSV or JSON, judged by its name or its first character."""
    if PurePosixPath(url).suffix.lower() in _TEXT_NAMES:
        return True
    try:
        return read_file(url, limit=_HEAD).lstrip().startswith((b"{", b"["))
    except StorageError:
        return False


def conversion_of_text(url: str) -> str:
    """The remedy for requests that are CSV or JSON."""
    return (
        f"requests: {url} is CSV or JSON, not Parquet; convert it with "
        f"'pmet facts convert {url} requests.parquet' and name that file"
    )


def conversion_of_columns(url: str, names: Collection[str]) -> str:
    """The remedy for Parquet without the columns of requests; empty if no format fits."""
    if any(name in names for name in _OF_DATA_SETS):
        what, options = "records of a data set of edits", ""
    elif all(name in names for name in _OF_DUMPS):
        what, options = "a fact dump", " --templates templates.yaml"
    else:
        return ""
    return (
        f"; it holds {what}: convert it with 'pmet facts convert {url} requests.parquet{options}'"
    )
