"""JSON that people write: a key that is given twice is refused, where Python keeps the last one."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKeyError(ValueError):
    """An object has a key twice."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RepeatedKeyError: an object has a key twice; the message names it.
        ValueError: its syntax is wrong.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(f"key {repeated(names)!r} is given twice; keep one of them")
    return values


def repeated(names: list[str]) -> str:
    """The first of some names that comes again."""
    return next(name for place, name in enumerate(names) if name in names[place + 1 :])
