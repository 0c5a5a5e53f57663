"""Decides which of an entity's statements about a property holds now.

Deprecated statements never count, and normal ones only if none is preferred. Of these, statements
that have ended, or not begun, are passed over. If several values remain, the one that began last
holds; a statement without a date is older than any with one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from jobs.facts.wikidata.entities import (
    UNQUALIFIED,
    DataValue,
    Qualifiers,
    Snak,
    Statement,
    decode_qualifiers,
)
from jobs.facts.wikidata.values import Moment, ValueRefusedError, moment

Date = tuple[int, int, int]
_UNDATED: Date = (-(10**17), 0, 0)


class Current(NamedTuple):
    """The value that holds now, and the first day on which it no longer will, if known."""

    value: DataValue
    until: Date | None


class _Dated(NamedTuple):
    value: DataValue
    since: Date
    until: Date | None


def current(statements: Sequence[Statement], today: Date, passed: Counter[str]) -> Current:
    """Return the value that holds.

    Args:
        statements: all statements of a property.
        today: the day.
        passed: counts the statements passed over, by reason.

    Raises:
        ValueRefusedError: no single value holds.
        msgspec.MsgspecError: a qualifier has an unexpected shape.
    """
    best = _best(statements, passed)
    holding = [
        dated for statement in best if (dated := _dated(statement, today, passed)) is not None
    ]
    if not holding:
        _refuse(best, today)
    if len(holding) == 1:
        return Current(holding[0].value, holding[0].until)
    latest = max(dated.since for dated in holding)
    values = {bytes(memoryview(dated.value.value)): dated for dated in holding}
    last = {
        bytes(memoryview(dated.value.value)): dated for dated in holding if dated.since == latest
    }
    if len(last) > 1:
        raise ValueRefusedError("several-values", f"{len(last)} values hold at the same time")
    passed["replaced by a later value"] += len(values) - 1
    chosen = next(iter(last.values()))
    return Current(chosen.value, chosen.until)


def day(time: datetime) -> Date:
    """Return the day of a time."""
    return time.year, time.month, time.day


def _best(statements: Sequence[Statement], passed: Counter[str]) -> list[Statement]:
    by_rank: dict[str, list[Statement]] = {"preferred": [], "normal": [], "deprecated": []}
    for statement in statements:
        by_rank.get(statement.rank, by_rank["deprecated"]).append(statement)
    passed["deprecated"] += len(by_rank["deprecated"])
    if by_rank["preferred"]:
        passed["of lower rank"] += len(by_rank["normal"])
        return by_rank["preferred"]
    if not by_rank["normal"]:
        raise ValueRefusedError("deprecated", "all statements are deprecated")
    return by_rank["normal"]


def _dated(statement: Statement, today: Date, passed: Counter[str]) -> _Dated | None:
    """Return a statement's value if it holds today, else None."""
    qualifiers = decode_qualifiers(statement.qualifiers)
    if qualifiers is UNQUALIFIED and statement.mainsnak.snaktype == "value":
        value = statement.mainsnak.datavalue
        if value is not None:
            return _Dated(value, _UNDATED, None)
    state = _state(statement, qualifiers, today)
    if state != "holds":
        passed[state] += 1
        return None
    value = statement.mainsnak.datavalue
    assert value is not None, "checked by _state"
    ends = [time.start for time in _times(qualifiers.end)]
    begins = [time.start for time in (*_times(qualifiers.start), *_times(qualifiers.point))]
    return _Dated(value, max(begins, default=_UNDATED), min(ends, default=None))


def _state(statement: Statement, qualifiers: Qualifiers, today: Date) -> str:
    """Return ``holds``, or why a statement does not."""
    if any(snak.snaktype == "somevalue" for snak in qualifiers.end):
        return "ended"
    if any(time.start <= today for time in _times(qualifiers.end)):
        return "ended"
    if any(time.start > today for time in _times(qualifiers.start)):
        return "not begun"
    if statement.mainsnak.snaktype == "novalue":
        return "without a value"
    if statement.mainsnak.snaktype != "value" or statement.mainsnak.datavalue is None:
        return "of an unknown value"
    return "holds"


_REFUSALS = {
    "ended": "all statements have ended",
    "not begun": "the statements have not begun",
    "without a value": "it is stated that there is no value",
    "of an unknown value": "the value is stated to be unknown",
}


def _refuse(best: Sequence[Statement], today: Date) -> None:
    """Raise the reason why no statement holds: that of the one which comes closest."""
    states = {_state(s, decode_qualifiers(s.qualifiers), today) for s in best}
    state = next(name for name in reversed(_REFUSALS) if name in states)
    raise ValueRefusedError(state.replace(" ", "-"), _REFUSALS[state])


def _times(snaks: Sequence[Snak]) -> list[Moment]:
    """Return the known times of a qualifier."""
    values = [s.datavalue for s in snaks if s.snaktype == "value" and s.datavalue is not None]
    return [moment(value) for value in values if value.type == "time"]
