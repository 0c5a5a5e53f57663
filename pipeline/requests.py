"""Edit requests as a sequence over Arrow tables: objects are made when asked for, and not kept.

A request as a Python object takes kilobytes, and a fact dump has a great many of them.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any, overload

import numpy as np
import pyarrow as pa

from pmet.errors import RequestError
from pmet.request import TEXT_LISTS, EditRequest

REQUIRED_COLUMNS = ("prompt", "subject", "target_new")
OPTIONAL_COLUMNS = ("case_id", "target_true", *TEXT_LISTS)
REQUEST_COLUMNS = REQUIRED_COLUMNS + OPTIONAL_COLUMNS
NAMED_ROWS = 5  # of the rows that a row contradicts
_BATCH = 1024  # rows that are Python objects at a time
_CHUNK = 8192  # rows of a batch that requests are looked up in

_Values = Mapping[str, Any]


class Requests(Sequence[EditRequest]):
    """The requests of some rows of tables, in an order of their own.

    Args:
        tables: with the columns of requests, each as its file has them.
        rows: which rows, counted over all tables from 0; each has to be a valid request.
    """

    def __init__(self, tables: Sequence[pa.Table], rows: Iterable[int]) -> None:
        # By batch: to take rows from a column of many chunks, Arrow would put them together first.
        self._batches = [
            batch
            for table in tables
            for batch in _request_columns(table).to_batches(max_chunksize=_CHUNK)
        ]
        self._starts = [0, *accumulate(len(batch) for batch in self._batches)]
        self._rows = array("q", rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> EditRequest: ...
    @overload
    def __getitem__(self, place: slice) -> list[EditRequest]: ...
    def __getitem__(self, place: int | slice) -> EditRequest | list[EditRequest]:
        if isinstance(place, slice):
            return list(self._read(self._rows[place]))
        return next(self._read([self._rows[place]]))

    def __iter__(self) -> Iterator[EditRequest]:
        for start in range(0, len(self), _BATCH):
            yield from self[start : start + _BATCH]

    def of_rows(self, rows: Iterable[int]) -> Requests:
        """The requests of other rows of the same tables."""
        other = Requests([], rows)
        other._batches, other._starts = self._batches, self._starts
        return other

    def _read(self, rows: Sequence[int]) -> Iterator[EditRequest]:
        by_batch: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            by_batch[bisect_right(self._starts, row) - 1].append(row)
        found: dict[int, EditRequest] = {}
        for number, own in by_batch.items():
            places = pa.array([row - self._starts[number] for row in own], pa.int64())
            taken = pa.Table.from_batches([self._batches[number].take(places)])
            for row, values in zip(own, row_values(taken), strict=True):
                request = checked(values)
                assert isinstance(request, EditRequest), request
                found[row] = request
        for row in rows:
            yield found[row]


def check_rows(tables: Iterable[pa.Table]) -> dict[int, str]:
    """Why rows cannot be edited, by their number over all tables.

    A row is refused where ``EditRequest`` refuses it, where it repeats an earlier one (same prompt,
    subject and new target), and where rows contradict each other (same prompt and subject,
    different new targets): then all of them are.
    """
    reasons: dict[int, str] = {}
    repeats = Repeats()
    row = 0
    for table in map(_request_columns, tables):
        for start in range(0, len(table), _BATCH):
            for values in row_values(table.slice(start, _BATCH)):
                outcome = checked(values)
                if isinstance(outcome, str):
                    reasons[row] = outcome
                else:
                    repeats.add(row, outcome)
                row += 1
    return reasons | repeats.reasons()


def row_values(table: pa.Table) -> Iterator[_Values]:
    """The rows of a table of requests; text that is not UTF-8 becomes the error that says so."""
    columns = [_python_values(column) for column in table.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(table.column_names, row, strict=True))


def checked(values: _Values) -> EditRequest | str:
    """The request that a row asks for, or the reason why it cannot be carried out."""
    given = {name: value for name, value in values.items() if not _is_missing(value)}
    for name in REQUIRED_COLUMNS:
        if name not in given:
            return f"{name} is {'null' if values[name] is None else 'NaN'}; give text"
    for name, value in given.items():
        if (position := _undecodable(value)) is not None:
            return f"{name} is not UTF-8 at byte {position}; write it as UTF-8"
    if "case_id" in given:
        given["case_id"] = _whole(given["case_id"])
        if type(given["case_id"]) not in (int, str):
            return f"case_id is {given['case_id']!r}; give a whole number or text"
    try:
        return EditRequest(**given)
    except RequestError as error:
        return str(error)


def bytes_type(type_: pa.DataType) -> pa.DataType:
    """Text as bytes, also inside lists; other types stay."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.large_list(bytes_type(type_.value_type))
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return pa.large_binary() if is_text else type_


class Repeats:
    """Which rows repeat or contradict another one; 40 bytes a row."""

    def __init__(self) -> None:
        self._rows = array("q")
        # Two digests of 16 bytes a row: of what is asked, and of the answer wanted.
        self._digests = bytearray()

    def add(self, row: int, request: EditRequest) -> None:
        """Take in a valid row; rows come in ascending order."""
        self._rows.append(row)
        # Neither text holds a NUL that could move between them: their lengths go in, too.
        asked = f"{len(request.prompt)} {request.prompt}{request.subject}"
        self._digests += _digest(asked) + _digest(request.target_new)

    def reasons(self) -> dict[int, str]:
        """Why each of them is refused."""
        reasons: dict[int, str] = {}
        for rows_by_target in self._groups():
            for own, rows in rows_by_target.items():
                if len(rows_by_target) > 1:
                    others = (rows for other, rows in rows_by_target.items() if other != own)
                    reasons |= dict.fromkeys(rows, _contradiction(others))
                else:
                    text = f"repeats row {rows[0]}: same prompt, subject and target_new; keep one"
                    reasons |= dict.fromkeys(rows[1:], text)
        return reasons

    def _groups(self) -> Iterator[dict[bytes, list[int]]]:
        """Rows that ask the same, by what they want as an answer."""
        digests = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 4)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        asked = digests[order, :2]
        edges = np.flatnonzero((asked[1:] != asked[:-1]).any(axis=1)) + 1
        for start, stop in zip([0, *edges], [*edges, len(order)], strict=True):
            if stop - start < 2:
                continue
            group: dict[bytes, list[int]] = defaultdict(list)
            for place in order[start:stop].tolist():
                group[digests[place, 2:].tobytes()].append(self._rows[place])
            yield group


def _contradiction(others: Iterable[Sequence[int]]) -> str:
    named = list(islice((row for rows in others for row in rows), NAMED_ROWS + 1))
    listed = ", ".join(str(row) for row in sorted(named[:NAMED_ROWS]))
    more = ", …" if len(named) > NAMED_ROWS else ""
    return f"contradicts row {listed}{more}: same prompt and subject, another target_new; keep one"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _request_columns(table: pa.Table) -> pa.Table:
    return table.select([name for name in REQUEST_COLUMNS if name in table.column_names])


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(bytes_type(column.type)).to_pylist()]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return error


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> Any:
    """Whole numbers that were stored as floats, as they are beside missing ones, become int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _undecodable(value: Any) -> int | None:
    items = value if isinstance(value, list) else (value,)
    return next((item.start for item in items if isinstance(item, UnicodeDecodeError)), None)
