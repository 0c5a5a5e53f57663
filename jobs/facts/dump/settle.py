"""Settles the rows of each fact: which row is valid, and why the others are not.

A fact is a subject and a relation; texts are compared in their normal form
(`pipeline.data.normalization`). The row with the latest ``updated_at`` is valid; rows without a
time are older than any other. If the latest rows name different objects, the fact is undecided and
none of its rows is valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from jobs.facts.dump.problems import CONTRADICTION, DUPLICATE, FINE, REPLACED
from pipeline.data import normal_column


@dataclass(frozen=True)
class Codes:
    """Texts of several tables as numbers: texts with the same normal form share a number.

    Attributes:
        facts: (rows,) int64, a number for each subject and relation.
        objects: (rows,) int64, a number for each object.
    """

    facts: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Settled:
    """The outcome of each row of a table of facts.

    Attributes:
        codes: (rows,) uint8: ``FINE`` for the valid row, else the row's problem.
        others: (rows,) int64: index in the table of the row that the problem names; a row without a
            problem names itself.
    """

    codes: np.ndarray
    others: np.ndarray


def encode(*tables: pa.Table) -> list[Codes]:
    """Number the texts of several tables together, so that the numbers are comparable.

    Args:
        tables: tables with ``subject``, ``relation`` and ``object``.
    """
    both = pa.concat_tables([t.select(["subject", "relation", "object"]) for t in tables])
    subjects, relations, objects = (_numbers(column) for column in both.columns)
    facts = subjects * (relations.max(initial=0) + 1) + relations
    starts = np.cumsum([0, *(len(table) for table in tables)])
    spans = [slice(a, b) for a, b in pairwise(starts)]
    return [Codes(facts[span], objects[span]) for span in spans]


def settle(codes: Codes, times: np.ndarray) -> Settled:
    """Settle the rows of one table; the first of equal rows is kept.

    Args:
        codes: the numbers of its texts.
        times: (rows,) int64, ``UNDATED`` if there is none.
    """
    # Sort by fact, latest first (~x falls as x rises, without overflow); the sort is stable.
    order = np.lexsort((~times, codes.facts))
    facts, objects, moments = codes.facts[order], codes.objects[order], times[order]
    opens = np.append(True, facts[1:] != facts[:-1]) if len(order) else np.zeros(0, bool)
    group = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)[group]
    latest = moments == moments[first]
    differs = objects != objects[first]
    # Per fact, the first of the latest rows whose object differs from that of the first row.
    against = np.full(len(order), -1)
    disputes = np.flatnonzero(latest & differs)
    against[group[disputes[::-1]]] = disputes[::-1]
    disputed = against[group] >= 0
    found = np.select(
        [disputed & latest, differs | disputed, np.arange(len(order)) == first],
        [CONTRADICTION, REPLACED, FINE],
        DUPLICATE,
    )
    named = np.where(disputed & latest & ~differs, against[group], first)
    settled = np.empty(len(order), np.uint8)
    others = np.empty(len(order), np.int64)
    settled[order], others[order] = found, order[named]
    return Settled(settled, others)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    # One array has one dictionary; large text, because it always fits one array.
    text = column.cast(pa.large_string()).combine_chunks()
    encoded = text.dictionary_encode()
    numbers = _of_indices(encoded.indices)
    # Each distinct text is normalised once.
    texts = encoded.dictionary
    forms = normal_column(texts)
    if forms is texts:
        return numbers
    return _of_indices(forms.dictionary_encode().indices)[numbers]


def _of_indices(indices: pa.Array) -> np.ndarray:
    return indices.to_numpy(zero_copy_only=False).astype(np.int64)
