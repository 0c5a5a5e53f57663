"""Decodes Wikidata's entities; only what is asked for is read, the rest is skipped unread.

Skipping is why ``msgspec`` is used: a line has some ten kilobytes, of which a few hundred bytes
matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

_ID = re.compile(r"([QP])([1-9]\d{0,17})")
_NOTHING = msgspec.Raw(b"")


class DataValue(msgspec.Struct):
    """A value with its type; it is decoded where its type is known."""

    type: str
    value: msgspec.Raw


class Snak(msgspec.Struct):
    """A value of a property, or the statement that it is unknown or that there is none."""

    snaktype: str = "value"
    datavalue: DataValue | None = None


class Statement(msgspec.Struct):
    """A statement about an entity, with its rank and qualifiers."""

    mainsnak: Snak
    rank: str = "normal"
    qualifiers: msgspec.Raw = _NOTHING


class Qualifiers(msgspec.Struct):
    """The qualifiers that say when a statement holds."""

    start: list[Snak] = msgspec.field(name="P580", default_factory=list)
    end: list[Snak] = msgspec.field(name="P582", default_factory=list)
    point: list[Snak] = msgspec.field(name="P585", default_factory=list)


class Entity(msgspec.Struct):
    """An entity; its labels and statements are decoded on demand.

    Attributes:
        id: its identifier, such as ``Q42``; empty in a redirect.
        redirect: the entity that replaces it, in the text of a page.
        entity: its identifier in the text of a redirect.
    """

    id: str = ""
    labels: msgspec.Raw = _NOTHING
    claims: msgspec.Raw = _NOTHING
    redirect: str = ""
    entity: str = ""


UNQUALIFIED = Qualifiers()
_DATING = (b'"P580"', b'"P582"', b'"P585"')


class _Term(msgspec.Struct):
    value: str


_ENTITY = msgspec.json.Decoder(Entity)
_STATEMENTS = msgspec.json.Decoder(list[Statement])
_QUALIFIERS = msgspec.json.Decoder(Qualifiers)
UNREADABLE = (msgspec.MsgspecError, RecursionError, ValueError)
"""What decoding raises for text that is not JSON, or whose shape is unexpected."""


def number_of(identifier: str) -> int | None:
    """Return an item's number, the negative number of a property, None for anything else."""
    found = _ID.fullmatch(identifier)
    if found is None:
        return None
    return int(found[2]) if found[1] == "Q" else -int(found[2])


def identifier_of(number: int) -> str:
    """Return the identifier of a number from ``number_of``."""
    return f"Q{number}" if number > 0 else f"P{-number}"


def decode_entity(line: bytes | str) -> Entity:
    """Decode an entity; raises one of ``UNREADABLE``."""
    return _ENTITY.decode(line)


def decode_statements(raw: msgspec.Raw) -> list[Statement]:
    """Decode the statements of one property; raises one of ``UNREADABLE``."""
    return _STATEMENTS.decode(raw)


def decode_qualifiers(raw: msgspec.Raw) -> Qualifiers:
    """Decode qualifiers, ``UNQUALIFIED`` if none matters; raises one of ``UNREADABLE``."""
    text = memoryview(raw).tobytes()
    return _QUALIFIERS.decode(text) if any(name in text for name in _DATING) else UNQUALIFIED


class Labels:
    """Reads an entity's label in the first of some languages."""

    def __init__(self, languages: Sequence[str]) -> None:
        self._decoder = _decoder("Labels", languages, _Term | None, None)

    def of(self, entity: Entity) -> str | None:
        """Return the label; None if there is none. Raises one of ``UNREADABLE``."""
        if _is_empty(entity.labels):
            return None
        terms = msgspec.structs.astuple(self._decoder.decode(entity.labels))
        texts = (term.value.strip() for term in terms if term is not None)
        return next((text for text in texts if text), None)


class Claims:
    """Reads an entity's statements of some properties."""

    def __init__(self, properties: Sequence[str]) -> None:
        self._decoder = _decoder("Claims", properties, msgspec.Raw, _NOTHING)
        self._quoted = [f'"{name}"'.encode() for name in properties]

    def of(self, entity: Entity) -> Sequence[msgspec.Raw]:
        """Return the statements of each property, undecoded; empty where there are none."""
        raw = memoryview(entity.claims).tobytes()
        if _is_empty(entity.claims) or not any(name in raw for name in self._quoted):
            return [_NOTHING] * len(self._quoted)
        return msgspec.structs.astuple(self._decoder.decode(raw))


def _decoder(name: str, keys: Sequence[str], kind: Any, default: Any) -> Any:
    """Return a decoder that reads only some keys of an object, in their order."""
    fields = [(f"field{index}", kind, default) for index in range(len(keys))]
    rename = {f"field{index}": key for index, key in enumerate(keys)}
    return msgspec.json.Decoder(msgspec.defstruct(name, fields, rename=rename))


def _is_empty(raw: msgspec.Raw) -> bool:
    """Whether an object is absent or empty; Wikibase writes an empty one as a list."""
    return memoryview(raw).tobytes()[:8].replace(b" ", b"") in (b"", b"[]", b"{}", b"null")
