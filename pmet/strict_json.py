"""Hand-written JSON: repeated keys are detected, where Python would keep only the last value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


class RepeatedKeyError(ValueError):
    """A key occurs twice in an object."""


class RepeatedKeyDict(dict[str, Any]):
    """An object with a repeated key, of whose values the last is kept.

    Attributes:
        repeated: the key.
    """

    repeated: str


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        RepeatedKeyError: a key occurs twice in an object; the message names it.
        ValueError: its syntax is wrong.
        RecursionError: it is nested too deeply.
    """
    value = parse_records(text)
    if (key := repeated_key(value)) is not None:
        raise RepeatedKeyError(f"key {key!r} is given twice; keep one of them")
    return value


def parse_records(text: str) -> Any:
    """Parse records, of which single ones may be invalid: ``repeated_key`` finds them.

    Raises:
        ValueError: its syntax is wrong.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def repeated_key(value: Any) -> str | None:
    """The first repeated key anywhere in a value from ``parse_records``."""
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
