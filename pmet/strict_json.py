"""JSON that people write, where Python keeps only the last value of a key that is given twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


class RepeatedKeyError(ValueError):
    """An object has a key twice."""


class RepeatedKeyDict(dict[str, Any]):
    """An object that has a key twice; of its values the last one is kept.

    Attributes:
        repeated: the key.
    """

    repeated: str


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RepeatedKeyError: an object has a key twice; the message names it.
        ValueError: its syntax is wrong.
        RecursionError: it is nested too deeply.
    """
    value = parse_records(text)
    if (key := repeated_key(value)) is not None:
        raise RepeatedKeyError(f"key {key!r} is given twice; keep one of them")
    return value


def parse_records(text: str) -> Any:
    """The same for records, one of which may be wrong alone: ``repeated_key`` says which.

    Raises:
        ValueError: its syntax is wrong.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def repeated_key(value: Any) -> str | None:
    """The first key that is given twice, anywhere in a value of ``parse_records``."""
    if isinstance(value, RepeatedKeyDict):
        return value.repeated
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    return next((key for part in inner if (key := repeated_key(part)) is not None), None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    marked = RepeatedKeyDict(values)
    names = [name for name, _ in pairs]
    marked.repeated = next(name for name in values if names.count(name) > 1)
    return marked
