"""The JSON of all records: standard JSON, in which numbers may be infinite or NaN.

JSON cannot express NaN and infinity, and most readers reject Python's spelling of them. Such a
number is written as in MongoDB's Extended JSON, ``{"$numberDouble": "NaN"}``, ``"Infinity"`` or
``"-Infinity"``, and read back as the number. A mapping that looks like one is kept distinct: its
key is written with an additional ``$``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_KEY = "$numberDouble"
_ALIKE = re.compile(r"\$+numberDouble")
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Encode a value as standard JSON, keys in the order given; `loads` reads it back."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        pass
    else:
        # Few values need more than this.
        if _KEY not in text:
            return text
    return json.dumps(_written(value), indent=indent, ensure_ascii=False, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """Decode a text written by `dumps`, or any other JSON.

    Raises:
        ValueError: it is not JSON.
    """
    mark = _KEY.encode() if isinstance(text, bytes) else _KEY
    return json.loads(text, object_hook=_read if mark in text else None)  # type: ignore[operator]


def _written(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return {_KEY: next(word for word, number in _WORDS.items() if _same(number, value))}
        case dict():
            written = {key: _written(item) for key, item in value.items()}
            return {f"${_only(value)}": written[_only(value)]} if _is_alike(value) else written
        case list() | tuple():
            return [_written(item) for item in value]
        case _:
            return value


def _read(found: dict[str, Any]) -> Any:
    if not _is_alike(found):
        return found
    key = _only(found)
    if key != _KEY:
        return {key[1:]: found[key]}
    word = found[key]
    # Mappings from other writers stay unchanged.
    return _WORDS.get(word, found) if isinstance(word, str) else found


def _is_alike(value: dict[Any, Any]) -> bool:
    return (
        len(value) == 1 and isinstance(_only(value), str) and bool(_ALIKE.fullmatch(_only(value)))
    )


def _only(value: dict[Any, Any]) -> Any:
    return next(iter(value))


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
