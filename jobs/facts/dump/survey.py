"""Surveys whole dumps: judges every row and settles the rows of each fact."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from jobs.facts.dump.files import Dump
from jobs.facts.dump.partitions import Partitions, partition_count
from jobs.facts.dump.problems import FINE, NAMES_ANOTHER_ROW, PROBLEMS
from jobs.facts.dump.rows import JudgedRows, judge
from jobs.facts.dump.settle import Codes, Settled, encode, settle

ALWAYS = datetime(1, 1, 2, tzinfo=UTC)
"""A time at which no fact had expired."""


@dataclass(frozen=True)
class Side:
    """A dump to survey, alone or together with others.

    Attributes:
        dump: the dump.
        as_of: facts whose ``valid_until`` is at or before this time have expired.
        relations: the relations that have a template; None: do not check.
        damaged: receives a message for each damaged file; None: damage raises.
        judged: called with every batch of rows after it is judged.
    """

    dump: Dump
    as_of: datetime
    relations: Collection[str] | None = None
    damaged: list[str] | None = None
    judged: Callable[[JudgedRows], None] | None = None


@dataclass(frozen=True)
class SettledFacts:
    """The rows of one partition of a dump that have no problem by themselves.

    Attributes:
        facts: the rows (see ``JudgedRows.facts``).
        numbers: their texts as numbers, shared by all sides.
        settled: the outcome of each row.
    """

    facts: pa.Table
    numbers: Codes
    settled: Settled

    @property
    def holding(self) -> np.ndarray:
        """Indices of the valid rows: one per decided fact."""
        return np.flatnonzero(self.settled.codes == FINE)

    def places(self, facts: np.ndarray) -> np.ndarray:
        """(n,) int64: index of the valid row of each of n facts, by number; -1 for none."""
        holding = self.holding
        held = self.numbers.facts[holding]
        order = np.argsort(held)
        at = np.searchsorted(held, facts, sorter=order)
        # One extra place, for facts beyond the last one held.
        candidates = np.append(holding[order], -1)[at]
        return np.where(np.append(held[order], -1)[at] == facts, candidates, -1)


@dataclass(frozen=True)
class Survey:
    """The outcome of every row of a dump.

    Attributes:
        codes: (rows,) uint8, ``FINE`` or the row's problem.
        naming: (n,) int64, ascending: rows whose problem names another row.
        named: (n,) int64: the row that each of them names.
        controls: rows whose only problem is a control character.
    """

    codes: np.ndarray
    naming: np.ndarray
    named: np.ndarray
    controls: np.ndarray

    def reasons(self, rows: np.ndarray) -> pa.Array:
        """Return the reasons of some rejected rows, as text."""
        codes = self.codes[rows]
        texts = pa.array([problem.reason for problem in PROBLEMS]).take(pa.array(codes))
        naming = np.isin(codes, NAMES_ANOTHER_ROW)
        if not naming.any():
            return texts
        others = self.named[np.searchsorted(self.naming, rows[naming])]
        written = texts.to_numpy(zero_copy_only=False)
        written[naming] = [
            text.replace("{row}", str(other))
            for text, other in zip(written[naming], others, strict=True)
        ]
        return pa.array(written, pa.string())


def settled(*sides: Side) -> Iterator[list[SettledFacts]]:
    """Judge all rows of several dumps, then settle them a partition at a time.

    Yields:
        For each partition, the facts of each side, any of which may be empty. A fact is in the same
        partition on all sides.

    Raises:
        FactDumpError: a file is damaged.
    """
    count = partition_count(max(side.dump.rows for side in sides))
    with ExitStack() as stack:
        parts = [stack.enter_context(Partitions(count)) for _ in sides]
        for side, partitions in zip(sides, parts, strict=True):
            _fill(partitions, side)
        for tables in zip(*(partitions.tables() for partitions in parts), strict=True):
            if any(table is not None and len(table) for table in tables):
                yield _settled(tables)


def survey(side: Side, *beside: Side, take: Callable[..., None] | None = None) -> Survey:
    """Survey a dump, alone or together with others; return the outcome of each of its rows.

    Args:
        side: the dump.
        beside: other dumps to settle along with it.
        take: called with the settled facts of all sides, a partition at a time.

    Raises:
        FactDumpError: a file is damaged.
    """
    codes = np.zeros(side.dump.rows, np.uint8)
    controls: list[np.ndarray] = []

    def note(judged: JudgedRows) -> None:
        codes[judged.first : judged.first + len(judged.codes)] = judged.codes
        controls.append(judged.controls)
        if side.judged is not None:
            side.judged(judged)

    naming: list[np.ndarray] = []
    named: list[np.ndarray] = []
    noting = Side(side.dump, side.as_of, side.relations, side.damaged, note)
    for facts, *others in settled(noting, *beside):
        rows = facts.facts.column("row").to_numpy()
        codes[rows] = facts.settled.codes
        names_another = np.isin(facts.settled.codes, NAMES_ANOTHER_ROW)
        naming.append(rows[names_another])
        named.append(rows[facts.settled.others[names_another]])
        if take is not None:
            take(facts, *others)
    all_naming, all_named = _joined(naming), _joined(named)
    order = np.argsort(all_naming)
    return Survey(codes, all_naming[order], all_named[order], _joined(controls))


def _fill(partitions: Partitions, side: Side) -> None:
    for judged in judge(
        side.dump, as_of=side.as_of, relations=side.relations, damaged=side.damaged
    ):
        if side.judged is not None:
            side.judged(judged)
        partitions.add(judged.facts)


def _settled(tables: Sequence[pa.Table | None]) -> list[SettledFacts]:
    schema = next(table.schema for table in tables if table is not None)
    present = [schema.empty_table() if table is None else table for table in tables]
    return [
        SettledFacts(facts, numbers, settle(numbers, facts.column("time").to_numpy()))
        for facts, numbers in zip(present, encode(*present), strict=True)
    ]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
