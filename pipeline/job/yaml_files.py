"""Hand-written YAML files at a path or a URL; ``pmet.yaml12`` defines how values are read."""

from __future__ import annotations

from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import read_file
from pmet.errors import InputError
from pmet.yaml12 import YAMLTextError, dump_yaml, parse_yaml

__all__ = ["YAMLTextError", "dump_yaml", "parse_yaml", "read_yaml"]


def read_yaml(
    source: str, label: str, *, limit: int, too_large: str, refusal: type[InputError]
) -> Any:
    """Read the value of a hand-written YAML file.

    Args:
        source: a path or a URL.
        label: the file's role, for the message if it cannot be read.
        limit: its largest size in bytes.
        too_large: the message for a larger file.
        refusal: the exception raised for an invalid file.

    Raises:
        InputError: of the kind ``refusal``; one line for each problem, naming the file.
    """
    try:
        data = read_file(source, limit=limit + 1)
    except StorageError as error:
        raise refusal(f"{label}: {error}") from None
    if len(data) > limit:
        raise refusal(f"{source}: {too_large}")
    try:
        return parse_yaml(data.decode())
    except UnicodeDecodeError as error:
        raise refusal(f"{source}: not UTF-8 text ({error}); save it as UTF-8") from None
    except YAMLTextError as error:
        raise refusal("\n".join(f"{source}: {problem}" for problem in error.problems)) from None
