"""Figures by a column of the requests: which relations a model learned, and which it did not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.data import Row
from pipeline.errors import JobError
from pipeline.evaluation.confidence import intervals, rounded
from pmet.evaluation import summarize

USUAL = ("relation_id", "relation")
MOST = 200
"""The maximum number of groups reported, largest first."""
_NO_NAME = "–"

Figures = Mapping[Row, Mapping[str, Any]]


def group_column(wanted: str | None, names: Sequence[str]) -> str | None:
    """Return the column to group by: the one given, or a default column if it exists.

    Raises:
        JobError: the given column does not exist.
    """
    if wanted is not None and wanted not in names:
        raise JobError(
            f"evaluate.group_by: the requests have no column {wanted!r}; they have "
            f"{', '.join(names)}"
        )
    return wanted or next((name for name in USUAL if name in names), None)


def grouped(
    column: str | None, table: pa.Table, rows: Sequence[Row], measured: Mapping[str, Figures]
) -> dict[str, Any] | None:
    """Compute the figures of each group of requests, largest group first.

    Args:
        column: a column of the table; None: no groups.
        table: all input rows.
        rows: the input rows to group.
        measured: figures by input row, ``before`` and ``after``.

    Returns:
        The column and its groups, each with its number of requests, figures and intervals; None
        without a column. ``left_out`` is the number of groups beyond the maximum reported.
    """
    if column is None:
        return None
    members: dict[str, list[Row]] = defaultdict(list)
    for row, value in zip(rows, table.column(column).take(pa.array(rows, pa.int64())), strict=True):
        members[_name(value.as_py())].append(row)
    order = sorted(members, key=lambda name: (-len(members[name]), name))
    found: dict[str, Any] = {
        "column": column,
        "rows": [_group(name, members[name], measured) for name in order[:MOST]],
    }
    return found | ({"left_out": len(order) - MOST} if len(order) > MOST else {})


def _group(name: str, rows: Sequence[Row], measured: Mapping[str, Figures]) -> dict[str, Any]:
    own = {when: [m[row] for row in rows if row in m] for when, m in measured.items()}
    return {
        "name": name,
        "requests": len(rows),
        **{when: summarize(figures) for when, figures in own.items()},
        "intervals": {when: rounded(intervals(figures)) for when, figures in own.items()},
    }


def _name(value: Any) -> str:
    return _NO_NAME if value is None else str(value)
