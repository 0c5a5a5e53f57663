"""Helpers shared by the formats: a record's fields and the subject's placeholder in its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]


class RecordError(ValueError):
    """A record cannot be converted; the message is the reason."""


@dataclass(frozen=True)
class Edit:
    """One edit that a record asks for.

    Attributes:
        request: the arguments of ``EditRequest``.
        extra: the record's other fields, which are copied.
    """

    request: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        name: its name for ``--format``.
        matches: says whether a record looks like this format.
        parts: splits a record into parts that each ask for one edit; most formats have one.
        edit: returns the edit that a part asks for, given its row number; raises ``RecordError`` if
            it cannot be converted.
    """

    name: str
    matches: Callable[[Record], bool]
    edit: Callable[[Record, int], Edit]
    parts: Callable[[Record], Iterator[Record]] = lambda record: iter([record])


def text(record: Record, *path: str) -> str:
    """Return the text at a path of keys."""
    value: Any = record
    for index, key in enumerate(path):
        where = ".".join(path[: index + 1])
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise RecordError(f"{where} is missing; give text")
        value = value[key]
    if not isinstance(value, str):
        raise RecordError(f"{'.'.join(path)} is {type(value).__name__}, not a string; give text")
    return value


def case_id(record: Record, row: int) -> Any:
    """Return the record's identifier or its row number; whole floats become int."""
    found = row if record.get("case_id") is None else record["case_id"]
    return int(found) if isinstance(found, float) and found.is_integer() else found


def first_text(value: Any) -> str | None:
    """Return the first text of a value that is text or nested lists of text."""
    return next(iter(texts(value)), None)


def texts(value: Any) -> list[str]:
    """Return all texts of a value that is text or nested lists of text."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    return [found for item in value for found in texts(item)] if isinstance(value, list) else []


def without(record: Record, *used: str) -> dict[str, Any]:
    """Return the fields of a record except the used ones."""
    return {name: value for name, value in record.items() if name not in used}


def with_place(prompt: str, subject: str) -> str:
    """Return a prompt with ``{}`` for the subject, replacing its only occurrence if need be."""
    if "{}" in prompt:
        return prompt
    subject = subject.strip()
    if not subject:
        raise RecordError("subject is empty; give text that is more than white space")
    places = [match.start() for match in re.finditer(f"(?={re.escape(subject)})", prompt)]
    if len(places) != 1:
        raise RecordError(
            f"the subject occurs {len(places)} times in the prompt; it must occur exactly once"
        )
    start, end = places[0], places[0] + len(subject)
    if _joined(prompt[start - 1 : start], subject[0]) or _joined(
        subject[-1], prompt[end : end + 1]
    ):
        raise RecordError("the subject is only a part of a longer word in the prompt")
    return prompt[:start] + "{}" + prompt[end:]


def _joined(left: str, right: str) -> bool:
    """Whether two characters belong to one word, in scripts that separate words."""
    return _is_of_word(left) and _is_of_word(right)


def _is_of_word(character: str) -> bool:
    # Scripts with upper and lower case put spaces between words; others, such as Chinese, do not.
    return character.isdigit() or character.lower() != character.upper()
