"""YAML files that people write, at a path or a URL; what is read as what, ``pmet.yaml12`` says."""

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
    """The value of a YAML file that a person wrote.

    Args:
        source: a path or a URL.
        label: what the file is, for the message where it cannot be read.
        limit: its largest size in bytes.
        too_large: what to say of a larger one.
        refusal: raised where the file is not what it should be.

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
