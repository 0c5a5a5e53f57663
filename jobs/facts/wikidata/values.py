"""Wikidata's values as plain text: times, quantities, texts, and references to other entities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from jobs.facts.wikidata.entities import DataValue, number_of

DAY, MONTH, YEAR, DECADE, CENTURY = 11, 10, 9, 8, 7
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_TIME = re.compile(r"([+-])(\d{1,16})-(\d\d)-(\d\d)T")
_UNIT = re.compile(r"https?://[^/]+/entity/(Q[1-9]\d*)")


class ValueRefusedError(ValueError):
    """A value cannot be written as text; the code and the reason are its arguments."""


class Value(NamedTuple):
    """A value: text, an entity to be named, or text followed by one, such as ``80 kilogram``."""

    text: str
    entity: int | None = None


class Moment(NamedTuple):
    """A time with its precision, from a century (7) to a day (11); years before 1 are negative."""

    year: int
    month: int
    day: int
    precision: int

    @property
    def start(self) -> tuple[int, int, int]:
        """The first day of the period."""
        month = self.month if self.precision >= MONTH else 1
        return self.year, month, self.day if self.precision >= DAY else 1


class _Reference(msgspec.Struct):
    id: str | None = None
    numeric: int | None = msgspec.field(name="numeric-id", default=None)
    kind: str = msgspec.field(name="entity-type", default="item")


class _Time(msgspec.Struct):
    time: str
    precision: int


class _Quantity(msgspec.Struct):
    amount: str
    unit: str = "1"


class _Text(msgspec.Struct):
    text: str
    language: str


_REFERENCE = msgspec.json.Decoder(_Reference)
_TIMES = msgspec.json.Decoder(_Time)
_QUANTITY = msgspec.json.Decoder(_Quantity)
_TEXT = msgspec.json.Decoder(_Text)
_STRING = msgspec.json.Decoder(str)


def plain(value: DataValue, languages: Sequence[str]) -> Value:
    """Return a value as text, or as the entity that it refers to.

    Args:
        value: the value.
        languages: accepted languages of texts that have one; the first decides how dates are
            written.

    Raises:
        ValueRefusedError: its type cannot be written in a sentence, or it has another language.
        msgspec.MsgspecError: its shape is not that of its type.
    """
    match value.type:
        case "wikibase-entityid":
            return Value("", _entity(_REFERENCE.decode(value.value)))
        case "string":
            return Value(_STRING.decode(value.value).strip())
        case "monolingualtext":
            text = _TEXT.decode(value.value)
            if text.language not in languages:
                raise ValueRefusedError("another-language", f"its text is in {text.language!r}")
            return Value(text.text.strip())
        case "time":
            return Value(written(moment(value), english=languages[0].split("-")[0] == "en"))
        case "quantity":
            return _quantity(_QUANTITY.decode(value.value))
        case other:
            raise ValueRefusedError(
                "value-type", f"values of type {other!r} are not written as text"
            )


def moment(value: DataValue) -> Moment:
    """Return a value of type ``time``.

    Raises:
        ValueRefusedError: it is not a time.
        msgspec.MsgspecError: as ``plain``.
    """
    time = _TIMES.decode(value.value)
    found = _TIME.match(time.time)
    if found is None:
        raise ValueRefusedError("unreadable", f"{time.time[:40]!r} is not a time")
    sign, year, month, day = found.groups()
    number = -int(year) if sign == "-" else int(year)
    if int(month) > len(_MONTHS):
        raise ValueRefusedError("unreadable", f"{time.time[:40]!r} is not a time")
    precision = min(time.precision, DAY if int(day) else MONTH) if int(month) else time.precision
    if not int(month):
        precision = min(precision, YEAR)
    return Moment(number, int(month), int(day), precision)


def written(time: Moment, *, english: bool) -> str:
    """Return a time as text: ``11 March 1952`` in English, ``1952-03-11`` in other languages.

    Raises:
        ValueRefusedError: it is less precise than a century.
    """
    era = " BC" if time.year < 0 else ""
    year = str(abs(time.year))
    if time.precision < CENTURY or (time.precision < YEAR and not english):
        raise ValueRefusedError("coarse-time", "the time is less precise than a century or a year")
    if time.precision == CENTURY:
        return f"{_ordinal((abs(time.year) + 99) // 100)} century{era}"
    if time.precision == DECADE:
        return f"{abs(time.year) // 10 * 10}s{era}"
    if time.precision == YEAR:
        return f"{year}{era}"
    if not english:
        date = f"{'-' if time.year < 0 else ''}{abs(time.year):04d}-{time.month:02d}"
        return date if time.precision == MONTH else f"{date}-{time.day:02d}"
    date = f"{_MONTHS[time.month - 1]} {year}{era}"
    return date if time.precision == MONTH else f"{time.day} {date}"


def _entity(reference: _Reference) -> int:
    found = number_of(reference.id or "")
    if found is None and reference.id is None and reference.numeric is not None:
        # Old statements have only the number.
        found = number_of(f"{'P' if reference.kind == 'property' else 'Q'}{reference.numeric}")
    if found is None:
        raise ValueRefusedError("value-type", f"{reference.id!r} is neither an item nor a property")
    return found


def _quantity(quantity: _Quantity) -> Value:
    amount = quantity.amount.removeprefix("+")
    if not re.fullmatch(r"-?\d+(\.\d+)?", amount):
        raise ValueRefusedError("unreadable", f"{quantity.amount[:40]!r} is not an amount")
    unit = _UNIT.fullmatch(quantity.unit)
    return Value(amount, None if unit is None else number_of(unit[1]))


def _ordinal(number: int) -> str:
    ending = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{ending}"
