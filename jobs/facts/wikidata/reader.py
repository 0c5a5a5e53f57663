"""Turns entities into rows: one per property that an entity has statements about.

A row is a fact whose object may still be an entity without a name, or says why there is no fact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import NamedTuple

import msgspec

from jobs.facts.wikidata.entities import (
    UNREADABLE,
    Claims,
    Entity,
    Labels,
    decode_entity,
    decode_statements,
    number_of,
)
from jobs.facts.wikidata.statements import Date, current, day
from jobs.facts.wikidata.values import ValueRefusedError, plain

INSTANCE_OF = "P31"
_LONGEST_REASON = 120


class WikidataSettings(NamedTuple):
    """What is taken from Wikidata.

    Attributes:
        properties: the properties that become relations.
        languages: languages of labels, the first one preferred.
        classes: only entities that are directly an instance of one of these; empty: all.
        as_of: the time at which facts must hold.
    """

    properties: Sequence[str]
    languages: Sequence[str]
    classes: Sequence[str]
    as_of: datetime

    @property
    def spoken(self) -> str:
        """The languages, for people."""
        return ", ".join(self.languages)


class Row(NamedTuple):
    """A row before its object is named; the columns of ``staging.ROWS``."""

    subject: str | None
    relation: str | None
    text: str | None = None
    entity: int | None = None
    case_id: str | None = None
    subject_id: str | None = None
    valid_until: date | None = None
    code: str | None = None
    reason: str | None = None


@dataclass
class Notes:
    """What was read and passed over without a row of its own.

    Attributes:
        entities: entities by what became of them.
        statements: statements passed over, by reason.
    """

    entities: Counter[str] = field(default_factory=Counter)
    statements: Counter[str] = field(default_factory=Counter)

    def lines(self) -> dict[str, int]:
        """Return the counts above 0, by what they count."""
        named = {f"statements {name}": n for name, n in self.statements.items()}
        return {name: n for name, n in {**self.entities, **named}.items() if n}


class EntityReader:
    """Turns entities into rows.

    Attributes:
        notes: counts of what gives no row.
    """

    def __init__(self, settings: WikidataSettings) -> None:
        self.notes = Notes()
        self._settings = settings
        self._labels = Labels(settings.languages)
        self._properties = list(dict.fromkeys([*settings.properties, INSTANCE_OF]))
        self._claims = Claims(self._properties if settings.classes else settings.properties)
        self._classes = {number_of(name) for name in settings.classes}
        self._today = day(settings.as_of)

    def read(self, text: bytes | str, where: str) -> tuple[int | None, str | None, list[Row]]:
        """Return an entity's number, its label and its rows.

        Args:
            text: the entity as JSON.
            where: its place in the file, for reasons.
        """
        self.notes.entities["entities"] += 1
        try:
            entity = decode_entity(text)
            number = number_of(entity.id or entity.entity)
            label = self._labels.of(entity)
            claims = self._claims.of(entity)
        except UNREADABLE as error:
            reason = f"{where}: not an entity ({_short(error)})"
            return None, None, [Row(None, None, code="unreadable", reason=reason)]
        if number is None:
            self.notes.entities["neither an item nor a property"] += 1
            return None, None, []
        if entity.redirect:
            self.notes.entities["redirects"] += 1
            return number, None, []
        rows = self._rows(entity, label, claims)
        return number, label, rows

    def too_long(self, where: str, longest: int) -> Row:
        """Return the row of a line that is too long to be an entity."""
        self.notes.entities["entities"] += 1
        reason = f"{where}: longer than {longest >> 20} MiB"
        return Row(None, None, code="over-long-line", reason=reason)

    def _rows(self, entity: Entity, label: str | None, claims: Sequence[msgspec.Raw]) -> list[Row]:
        stated = [
            (name, raw)
            for name, raw in zip(self._settings.properties, claims, strict=False)
            if memoryview(raw).nbytes > 2
        ]
        if not stated:
            self.notes.entities["without these properties"] += 1
            return []
        if self._classes and not self._is_wanted(claims):
            self.notes.entities["of another class"] += 1
            return []
        return [self._row(entity, label, name, raw) for name, raw in stated]

    def _is_wanted(self, claims: Sequence[msgspec.Raw]) -> bool:
        raw = claims[self._properties.index(INSTANCE_OF)]
        try:
            statements = decode_statements(raw) if memoryview(raw).nbytes else []
            values = [
                plain(s.mainsnak.datavalue, self._settings.languages).entity
                for s in statements
                if s.rank != "deprecated" and s.mainsnak.datavalue is not None
            ]
        except UNREADABLE:
            return False
        return not self._classes.isdisjoint(values)

    def _row(self, entity: Entity, label: str | None, name: str, raw: msgspec.Raw) -> Row:
        row = Row(label, name, case_id=f"{entity.id}-{name}", subject_id=entity.id)
        languages = self._settings.languages
        try:
            if label is None:
                raise ValueRefusedError(
                    "subject-without-label", f"the subject has no label in {self._settings.spoken}"
                )
            value, until = current(decode_statements(raw), self._today, self.notes.statements)
            text, other = plain(value, languages)
        except ValueRefusedError as problem:
            code, reason = problem.args
            return row._replace(code=code, reason=reason)
        except UNREADABLE as error:
            reason = f"the statements have an unexpected shape ({_short(error)})"
            return row._replace(code="unreadable", reason=reason)
        return row._replace(text=text, entity=other, valid_until=_date(until))


def _date(until: Date | None) -> date | None:
    """Return the last day of a fact that is known to end; ``valid_until`` means the whole day."""
    if until is None or not 1 <= until[0] <= date.max.year:
        return None
    try:
        first = date(until[0], until[1], until[2])
    except ValueError:
        return None
    return first - timedelta(days=1)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
