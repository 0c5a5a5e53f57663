"""Rows of one fact settled: which of them holds, and what becomes of the others.

A fact is a subject and a relation, and texts are compared in their normal form
(`pipeline.data.normalization`). Of its rows the one with the latest ``updated_at`` holds; rows
without a time are older than any other. Where the latest rows name different objects, nothing
decides, and none of them holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from jobs.facts.problems import CONTRADICTION, DUPLICATE, FINE, REPLACED
from pipeline.data import normal_column


@dataclass(frozen=True)
class Codes:
    """Texts of several tables as numbers: texts of one normal form have one number.

    Attributes:
        facts: (rows,) int64, a number for each subject and relation.
        objects: (rows,) int64, a number for each object.
    """

    facts: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Settled:
    """What becomes of each row of a table of facts.

    Attributes:
        codes: (rows,) uint8: ``FINE`` for the row that holds, else the row's problem.
        others: (rows,) int64: place in the table of the row that the problem names; a row that
            is fine names itself.
    """

    codes: np.ndarray
    others: np.ndarray


def encode(*tables: pa.Table) -> list[Codes]:
    """Number the texts of tables together, so that their numbers can be compared.

    Args:
        tables: with ``subject``, ``relation`` and ``object``.
    """
    both = pa.concat_tables([t.select(["subject", "relation", "object"]) for t in tables])
    subjects, relations, objects = (_numbers(column) for column in both.columns)
    facts = subjects * (relations.max(initial=0) + 1) + relations
    starts = np.cumsum([0, *(len(table) for table in tables)])
    spans = [slice(a, b) for a, b in pairwise(starts)]
    return [Codes(facts[span], objects[span]) for span in spans]


def settle(codes: Codes, times: np.ndarray) -> Settled:
    """Settle the rows of one table, of which the first of equal ones is kept.

    Args:
        codes: their numbers.
        times: (rows,) int64, ``UNDATED`` where there is none.
    """
    # By fact, the latest first (~x falls as x rises, without overflow); the sort is stable.
    order = np.lexsort((~times, codes.facts))
    facts, objects, moments = codes.facts[order], codes.objects[order], times[order]
    opens = np.append(True, facts[1:] != facts[:-1]) if len(order) else np.zeros(0, bool)
    group = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)[group]
    latest = moments == moments[first]
    differs = objects != objects[first]
    # The first of the latest rows that name another object than the very first, by group.
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
    # As one array, whose dictionary is made once; as large text, which one array always holds.
    text = column.cast(pa.large_string()).combine_chunks()
    encoded = text.dictionary_encode()
    numbers = _of_indices(encoded.indices)
    # Each text is brought into its normal form once, however often it occurs.
    texts = encoded.dictionary
    forms = normal_column(texts)
    if forms is texts:
        return numbers
    return _of_indices(forms.dictionary_encode().indices)[numbers]


def _of_indices(indices: pa.Array) -> np.ndarray:
    return indices.to_numpy(zero_copy_only=False).astype(np.int64)
