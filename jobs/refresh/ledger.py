"""The ledger: the facts that a model is meant to know, with their state, age and source.

A fact is a relation and a subject. Its entry is *live* (part of every update), *quarantined* (the
model did not learn it), *rejected* (it cannot be edited into this model) or *retracted* (by a
person). Facts that a dump no longer holds leave the ledger; retracted facts stay, so that the next
dump does not bring them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import pyarrow as pa

from jobs.facts.sharing import beginning

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
"""``object`` and ``prompt`` are null if the fact is retracted, ``reason`` if it is live, ``source``
if the dump has none, ``learned`` if it was not measured."""

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
        relation: relation of the fact.
        subject: subject of the fact.
        object: object in the dump; None if retracted.
        prompt: its prompt, ``{}`` for the subject; None if retracted.
        state: see the module.
        reason: why it is not live.
        since: when it entered this state with this object, ISO 8601 in UTC.
        version: version in which it did.
        source: its source according to the dump.
        learned: whether the last measured version answers it correctly; None if not measured.
        misses: number of consecutive refreshes that edited it without success.
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
    """A fact of the current dump.

    Attributes:
        relation: relation of the fact.
        subject: subject of the fact.
        object: object in the dump.
        prompt: its prompt, ``{}`` for the subject.
        source: its source.
    """

    relation: str
    subject: str
    object: str
    prompt: str
    source: str | None = None


class LedgerChange(NamedTuple):
    """A change that a refresh makes to a fact.

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
    """Ledger entries by fact."""

    entries: dict[Key, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, table: pa.Table) -> Ledger:
        """Build a ledger from its table."""
        rows = (Entry(**row) for row in table.to_pylist())
        return cls({entry.key: entry for entry in rows})

    def table(self) -> pa.Table:
        """Return the ledger's table, sorted by relation and subject."""
        entries = [self.entries[key] for key in sorted(self.entries)]
        columns = [
            pa.array([getattr(entry, name) for entry in entries], type_)
            for name, type_ in zip(SCHEMA.names, SCHEMA.types, strict=True)
        ]
        return pa.table(columns, schema=SCHEMA)

    def counts(self) -> dict[str, int]:
        """Return the number of entries in each state."""
        found = Counter(entry.state for entry in self.entries.values())
        return {s: found[s] for s in ("live", "quarantined", "rejected", "retracted")}

    def live(self) -> set[Key]:
        """Return the facts that are part of the update."""
        return {key for key, entry in self.entries.items() if entry.state == "live"}


class VersionStamp(NamedTuple):
    """The time and version of a refresh.

    Attributes:
        at: time, ISO 8601 in UTC.
        version: number of the version.
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
    night: VersionStamp,
) -> tuple[Ledger, list[LedgerChange]]:
    """Merge the current dump into the ledger, before anything is computed.

    Args:
        ledger: ledger of the version in use.
        dump: facts to edit according to the current dump, each once.
        undecided: facts on which the dump contradicts itself; their entries stay as they are.
        retracted: reason by retracted fact.
        restored: time by restored fact.
        night: the current refresh.

    Returns:
        The new ledger and the changes, sorted by relation and subject.
    """
    old = ledger.entries
    new: dict[Key, Entry] = {}
    changes: list[LedgerChange] = []
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
            changes.append(LedgerChange("removed", *key, old_object=entry.object))
    for key, reason in retracted.items():
        was = old.get(key)
        if was is not None and was.state == "retracted":
            new[key] = was
            continue
        new[key] = Entry(*key, None, None, "retracted", reason or None, *night)
        old_object = None if was is None else was.object
        changes.append(
            LedgerChange("retracted", *key, old_object=old_object, reason=reason or None)
        )
    return Ledger(new), sorted(changes, key=lambda change: change[1:3])


def _told(
    entry: Entry | None, fact: DumpFact, restored: str | None, night: VersionStamp
) -> tuple[Entry, LedgerChange | None]:
    relation, subject, object_, prompt, source = fact
    live = Entry(relation, subject, object_, prompt, "live", None, *night, source=source)
    if entry is None:
        return live, LedgerChange("added", relation, subject, object=object_)
    again = entry.state != "live" and restored is not None and restored >= entry.since
    if entry.state == "retracted" or again:
        kind = "restored"
    elif entry.object != object_:
        kind = "changed"
    elif entry.prompt != prompt:
        kind = "reworded"
    else:
        return replace(entry, source=source), None
    return live, LedgerChange(kind, relation, subject, entry.object, object_)


class Outcome(NamedTuple):
    """The outcome of a live fact in a refresh.

    Attributes:
        state: ``live`` if it took part in the update, else its new state.
        reason: why it did not take part.
        learned: whether the edited model answers it correctly; None if not measured.
    """

    state: State
    reason: str | None = None
    learned: bool | None = None


def concluded(
    ledger: Ledger, outcomes: Mapping[Key, Outcome], *, patience: int | None, night: VersionStamp
) -> tuple[Ledger, list[LedgerChange]]:
    """Update the ledger with the outcomes of a refresh, for the next one to read.

    Args:
        ledger: from ``merged``.
        outcomes: outcome by live fact.
        patience: consecutive refreshes without success after which a fact is quarantined; None:
            never.
        night: the current refresh.

    Returns:
        The ledger, and the changes of facts that are no longer live.
    """
    entries = dict(ledger.entries)
    beside = Counter(_key(entries[key]) for key in outcomes)
    changes: list[LedgerChange] = []
    for key, outcome in outcomes.items():
        entry = entries[key]
        state, reason, misses = outcome.state, outcome.reason, entry.misses
        if outcome.learned is not None:
            misses = 0 if outcome.learned else misses + 1
        if state == "live" and patience is not None and misses >= patience:
            state = "quarantined"
            times = "once" if misses == 1 else f"{misses} times in a row"
            reason = f"edited {times} but not learned"
            if (others := beside[_key(entry)] - 1) > 0:
                facts = "another fact" if others == 1 else f"{others} other facts"
                reason += f"; it shares one key with {facts} of its subject"
        entry = replace(entry, learned=outcome.learned, misses=misses)
        if state != "live":
            entry = replace(
                entry, state=state, reason=reason, since=night.at, version=night.version
            )
            changes.append(LedgerChange(state, *key, object=entry.object, reason=reason))
        entries[key] = entry
    return Ledger(entries), sorted(changes, key=lambda change: change[1:3])


def _key(entry: Entry) -> tuple[str, str]:
    """Subject and the text before it: facts that agree in both share one key."""
    return entry.subject, beginning(entry.prompt or "")


def changes_table(changes: Iterable[LedgerChange]) -> pa.Table:
    """Return changes as a table with the schema ``CHANGES``."""
    return pa.Table.from_pylist([change._asdict() for change in changes], schema=CHANGES)
