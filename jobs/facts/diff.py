"""Compares two fact dumps.

A fact is a subject and a relation; its object may change. The comparison uses each dump's facts
after its rows are settled (``settle``), so the order of rows, their files and repetitions do not
matter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.files import BATCH_ROWS, Dump
from jobs.facts.dump.problems import CONTRADICTION
from jobs.facts.dump.survey import ALWAYS, SettledFacts, Side, settled

CHANGES = ("added", "changed", "removed", "undecided")
ADDED, CHANGED, REMOVED, UNDECIDED, UNCHANGED = range(5)

SCHEMA = pa.schema(
    [
        ("change", pa.string()),
        ("subject", pa.string()),
        ("relation", pa.string()),
        ("old_object", pa.string()),
        ("object", pa.string()),
    ]
)
"""Columns of a diff: ``old_object`` is null for an added fact, ``object`` for a removed or
undecided one."""


class FactChange(NamedTuple):
    """One fact that differs between the dumps."""

    change: str
    subject: str
    relation: str
    old_object: str | None
    object: str | None


@dataclass(frozen=True)
class Counts:
    """Number of facts of each kind.

    Attributes:
        added: facts that only the new dump holds.
        changed: facts with another object.
        removed: facts that only the old dump holds.
        undecided: facts whose rows in the new dump contradict each other; they count as no other
            kind, whatever the old dump held.
        unchanged: facts that are the same in both.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    undecided: int = 0
    unchanged: int = 0


class DumpDiff:
    """The facts that differ, kept in a file on the local disk until it is closed.

    Use it in a ``with`` block.

    Attributes:
        counts: number of facts of each kind.
    """

    def __init__(self, counts: Counts, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.counts = counts
        self._folder = folder

    def __enter__(self) -> DumpDiff:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file; ``batches`` can no longer be read."""
        self._folder.cleanup()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the facts that differ, in batches of ``SCHEMA``.

        Their order depends on the facts alone: by relation and subject, or, for dumps large enough
        to be compared in parts, by part first.
        """
        with pa.OSFile(_file(self._folder)) as file, pa.ipc.open_stream(file) as reader:
            yield from reader

    def first(self, change: str, count: int) -> list[FactChange]:
        """Return the first ``count`` facts of a kind of change."""
        found: list[FactChange] = []
        for batch in self.batches():
            rows = batch.filter(pc.equal(batch.column("change"), change))
            found += [FactChange(**row) for row in rows.slice(0, count - len(found)).to_pylist()]
            if len(found) == count:
                break
        return found


def diff_dumps(
    old: Dump, new: Dump, *, as_of: datetime | None = None, old_as_of: datetime | None = None
) -> DumpDiff:
    """Compare two dumps.

    Args:
        old: the earlier dump.
        new: the later dump.
        as_of: facts of ``new`` whose ``valid_until`` is at or before this time count as absent; now
            if None.
        old_as_of: like ``as_of``, for ``old``; None: all its facts count.

    Raises:
        FactDumpError: a file is damaged.
    """
    sides = (Side(old, old_as_of or ALWAYS), Side(new, as_of or datetime.now(UTC)))
    totals = dict.fromkeys((*CHANGES, "unchanged"), 0)
    folder = tempfile.TemporaryDirectory()
    try:
        with pa.OSFile(_file(folder), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for before, after in settled(*sides):
                changes, unchanged = _compared(before, after)
                totals["unchanged"] += unchanged
                for name in CHANGES:
                    totals[name] += pc.sum(pc.equal(changes.column("change"), name)).as_py() or 0
                writer.write_table(changes, max_chunksize=BATCH_ROWS)
    except BaseException:
        folder.cleanup()
        raise
    return DumpDiff(Counts(**totals), folder)


def _file(folder: tempfile.TemporaryDirectory[str]) -> str:
    return f"{folder.name}/diff.arrow"


def _compared(before: SettledFacts, after: SettledFacts) -> tuple[pa.Table, int]:
    """Return the differences in one partition, sorted, and the number of equal facts."""
    disputes = after.settled.codes == CONTRADICTION
    disputed, disputing = np.unique(after.numbers.facts[disputes], return_index=True)
    facts = np.unique(np.concatenate([_held(before), _held(after), disputed]))
    old, new = before.places(facts), after.places(facts)
    is_disputed = np.isin(facts, disputed)
    kinds = np.select([is_disputed, old < 0, new < 0], [UNDECIDED, ADDED, REMOVED], UNCHANGED)
    common = np.flatnonzero(kinds == UNCHANGED)
    differ = before.numbers.objects[old[common]] != after.numbers.objects[new[common]]
    kinds[common[differ]] = CHANGED
    # Every row of a fact names its subject and relation.
    any_row = np.where(new >= 0, new + len(before.facts), old)
    any_row[is_disputed] = len(before.facts) + np.flatnonzero(disputes)[disputing]
    differs = kinds != UNCHANGED
    table = _table(before, after, kinds[differs], any_row[differs], old[differs], new[differs])
    return table, int((~differs).sum())


def _table(
    before: SettledFacts,
    after: SettledFacts,
    kinds: np.ndarray,
    any_row: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
) -> pa.Table:
    both = pa.concat_tables([before.facts, after.facts])
    objects = both.column("object")
    columns = [
        pa.array(CHANGES).take(pa.array(kinds)),
        both.column("subject").take(pa.array(any_row)),
        both.column("relation").take(pa.array(any_row)),
        objects.take(pa.array(old, mask=old < 0)),
        objects.take(pa.array(new + len(before.facts), mask=new < 0)),
    ]
    table = pa.table(columns, schema=SCHEMA)
    return table.sort_by([("relation", "ascending"), ("subject", "ascending")])


def _held(side: SettledFacts) -> np.ndarray:
    return side.numbers.facts[side.holding]
