"""The ledger: which facts a model is meant to hold, since when, from where, and in which state.

A fact is a relation and a subject. Its entry is *live* (part of every update), *quarantined* (the
model could not be brought to say it), *rejected* (it cannot be told to this model at all) or
*retracted* (taken back by a person). What a dump no longer holds leaves the ledger; retracted facts
stay, so that the next dump does not bring them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import pyarrow as pa

State = Literal["live", "quarantined", "rejected", "retracted"]
Key = tuple[str, str]
"""Relation and subject."""

SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("subject", pa.string()),
        ("object", pa.string()),
        ("prompt", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("since", pa.string()),
        ("version", pa.int64()),
        ("source", pa.string()),
        ("learned", pa.bool_()),
        ("misses", pa.int32()),
    ]
)
"""``object`` and ``prompt`` are null where the fact is retracted, ``reason`` where it is live,
``source`` where the dump names none, ``learned`` where it was not measured."""

CHANGES = pa.schema(
    [
        ("change", pa.string()),
        ("relation", pa.string()),
        ("subject", pa.string()),
        ("old_object", pa.string()),
        ("object", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A fact in the ledger.

    Attributes:
        relation: of the fact.
        subject: of the fact.
        object: what the dump says; None where it is retracted.
        prompt: how it is told, ``{}`` for the subject; None where it is retracted.
        state: see the module.
        reason: why it is not live.
        since: when it came into this state with this object, ISO 8601 in UTC.
        version: the night in which it did.
        source: what the dump gives as its source.
        learned: whether the last version that was measured says it; None where it was not measured.
        misses: nights in a row that it was told and not learned.
    """

    relation: str
    subject: str
    object: str | None
    prompt: str | None
    state: State
    reason: str | None
    since: str
    version: int
    source: str | None = None
    learned: bool | None = None
    misses: int = 0

    @property
    def key(self) -> Key:
        """Relation and subject."""
        return (self.relation, self.subject)


class DumpFact(NamedTuple):
    """A fact of tonight's dump.

    Attributes:
        relation: of the fact.
        subject: of the fact.
        object: what the dump says.
        prompt: how it is told, ``{}`` for the subject.
        source: where it is from.
    """

    relation: str
    subject: str
    object: str
    prompt: str
    source: str | None = None


class Change(NamedTuple):
    """What a night does to a fact.

    The kinds: ``added``, ``changed`` (another object), ``reworded`` (another prompt), ``removed``,
    ``retracted``, ``restored``, ``quarantined``, ``rejected``.
    """

    change: str
    relation: str
    subject: str
    old_object: str | None = None
    object: str | None = None
    reason: str | None = None


@dataclass
class Ledger:
    """Entries by fact."""

    entries: dict[Key, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, table: pa.Table) -> Ledger:
        """A ledger from its table."""
        rows = (Entry(**row) for row in table.to_pylist())
        return cls({entry.key: entry for entry in rows})

    def table(self) -> pa.Table:
        """Its table, in the order of relations and subjects."""
        entries = [self.entries[key] for key in sorted(self.entries)]
        columns = [
            pa.array([getattr(entry, name) for entry in entries], type_)
            for name, type_ in zip(SCHEMA.names, SCHEMA.types, strict=True)
        ]
        return pa.table(columns, schema=SCHEMA)

    def counts(self) -> dict[str, int]:
        """How many entries there are in each state."""
        found = Counter(entry.state for entry in self.entries.values())
        return {s: found[s] for s in ("live", "quarantined", "rejected", "retracted")}

    def live(self) -> set[Key]:
        """The facts that are part of the update."""
        return {key for key, entry in self.entries.items() if entry.state == "live"}


class Night(NamedTuple):
    """When something is done, and in which version.

    Attributes:
        at: ISO 8601 in UTC.
        version: the night's number.
    """

    at: str
    version: int


def merged(
    ledger: Ledger,
    dump: Iterable[DumpFact],
    *,
    undecided: Collection[Key],
    retracted: Mapping[Key, str],
    restored: Mapping[Key, str],
    night: Night,
) -> tuple[Ledger, list[Change]]:
    """Tonight's ledger, before anything is computed.

    Args:
        ledger: last night's.
        dump: the facts that tonight's dump wants told, each once.
        undecided: facts of which the dump says several things: what was, stays.
        retracted: reason by fact that is taken back.
        restored: when, by fact that is to be tried again.
        night: tonight.

    Returns:
        The ledger, and what has changed, in the order of relations and subjects.
    """
    old = ledger.entries
    new: dict[Key, Entry] = {}
    changes: list[Change] = []
    for fact in dump:
        key = (fact.relation, fact.subject)
        if key not in retracted:
            new[key], change = _told(old.get(key), fact, restored.get(key), night)
            changes += [] if change is None else [change]
    for key, entry in old.items():
        if key in new or key in retracted:
            continue
        if key in undecided and entry.state != "retracted":
            new[key] = entry
        else:
            changes.append(Change("removed", *key, old_object=entry.object))
    for key, reason in retracted.items():
        was = old.get(key)
        if was is not None and was.state == "retracted":
            new[key] = was
            continue
        new[key] = Entry(*key, None, None, "retracted", reason or None, *night)
        old_object = None if was is None else was.object
        changes.append(Change("retracted", *key, old_object=old_object, reason=reason or None))
    return Ledger(new), sorted(changes, key=lambda change: change[1:3])


def _told(
    entry: Entry | None, fact: DumpFact, restored: str | None, night: Night
) -> tuple[Entry, Change | None]:
    relation, subject, object_, prompt, source = fact
    told = Entry(relation, subject, object_, prompt, "live", None, *night, source=source)
    if entry is None:
        return told, Change("added", relation, subject, object=object_)
    again = entry.state != "live" and restored is not None and restored >= entry.since
    if entry.state == "retracted" or again:
        kind = "restored"
    elif entry.object != object_:
        kind = "changed"
    elif entry.prompt != prompt:
        kind = "reworded"
    else:
        return replace(entry, source=source), None
    return told, Change(kind, relation, subject, entry.object, object_)


class Outcome(NamedTuple):
    """What became of a live fact in a night.

    Attributes:
        state: ``live`` where it took part in the update, else what it is now.
        reason: why it did not take part.
        learned: whether the edited model says it; None where it was not measured.
    """

    state: State
    reason: str | None = None
    learned: bool | None = None


def concluded(
    ledger: Ledger, outcomes: Mapping[Key, Outcome], *, patience: int | None, night: Night
) -> tuple[Ledger, list[Change]]:
    """Tonight's ledger with what was found out, as the next night will read it.

    Args:
        ledger: from ``merged``.
        outcomes: by fact that was live.
        patience: nights in a row after which a fact that is not learned is left out; None: never.
        night: tonight.

    Returns:
        The ledger, and the facts that are no longer live.
    """
    entries = dict(ledger.entries)
    changes: list[Change] = []
    for key, outcome in outcomes.items():
        entry = entries[key]
        state, reason, misses = outcome.state, outcome.reason, entry.misses
        if outcome.learned is not None:
            misses = 0 if outcome.learned else misses + 1
        if state == "live" and patience is not None and misses >= patience:
            state = "quarantined"
            nights = "in one night" if misses == 1 else f"in {misses} nights"
            reason = f"told and not learned {nights}"
        entry = replace(entry, learned=outcome.learned, misses=misses)
        if state != "live":
            entry = replace(
                entry, state=state, reason=reason, since=night.at, version=night.version
            )
            changes.append(Change(state, *key, object=entry.object, reason=reason))
        entries[key] = entry
    return Ledger(entries), sorted(changes, key=lambda change: change[1:3])


def changes_table(changes: Iterable[Change]) -> pa.Table:
    """Changes as a table of ``CHANGES``."""
    return pa.Table.from_pylist([change._asdict() for change in changes], schema=CHANGES)
