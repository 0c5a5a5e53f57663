"""Edit requests as a sequence over Arrow tables: objects are created on access, and not kept.

A request takes kilobytes as a Python object, and a fact dump may hold millions.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress, islice
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa

from pipeline.data.normalization import normal
from pipeline.data.rejections import Reason, RejectionCode
from pipeline.data.rows import Row
from pmet.errors import RequestError
from pmet.request import TEXT_LISTS, EditRequest

REQUIRED_COLUMNS = ("prompt", "subject", "target_new")
OPTIONAL_COLUMNS = ("case_id", "target_true", *TEXT_LISTS, "separator")
REQUEST_COLUMNS = REQUIRED_COLUMNS + OPTIONAL_COLUMNS
_PORTABILITY = ("portability_prompts", "portability_targets", "portability_targets_true")
NAMED_ROWS = 5  # how many contradicted rows a reason lists
_BATCH = 1024  # rows held as Python objects at a time
_CHUNK = 8192  # rows per batch for looking up requests

_Values = Mapping[str, Any]


class Requests(Sequence[EditRequest]):
    """The requests of some rows of tables, in any order.

    Args:
        tables: with the columns of requests, with the types of their files.
        rows: numbers of rows, counted over all tables from 0; each must be a valid request.
    """

    def __init__(self, tables: Sequence[pa.Table], rows: Iterable[int]) -> None:
        # By batch: to take rows from a column of many chunks, Arrow would concatenate them first.
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
                request, _ = checked(values)
                assert isinstance(request, EditRequest), request
                found[row] = request
        for row in rows:
            yield found[row]


class CheckedRows(NamedTuple):
    """The findings of a check of rows, by their number over all tables.

    Attributes:
        reasons: why rows cannot be edited.
        left_out: for the other rows, the texts left out because they are null or empty:
            ``paraphrase_prompts[1]``.
        breaking: how many of the other rows have a prompt that ends in a line break.
    """

    reasons: dict[Row, Reason]
    left_out: dict[Row, list[str]]
    breaking: int


def check_rows(tables: Iterable[pa.Table]) -> CheckedRows:
    """Check every row of some tables.

    A row is refused if ``EditRequest`` refuses it, if it repeats an earlier one (same prompt,
    subject and new target), or if it contradicts others (same prompt and subject, different new
    target): then all of them are refused. Texts are compared in their normal form
    (`pipeline.data.normalization`). Null and empty texts in lists are left out.
    """
    reasons: dict[Row, Reason] = {}
    left_out: dict[Row, list[str]] = {}
    breaking = array("q")
    repeats = Repeats()
    row = Row(0)
    for table in map(_request_columns, tables):
        for start in range(0, len(table), _BATCH):
            for values in row_values(table.slice(start, _BATCH)):
                outcome, empty = checked(values)
                if isinstance(outcome, str):
                    reasons[row] = Reason(RejectionCode.INVALID, outcome)
                else:
                    repeats.add(row, outcome)
                    if empty:
                        left_out[row] = empty
                    if outcome.prompt[-1:].isspace():
                        breaking.append(row)
                row = Row(row + 1)
    reasons |= repeats.reasons()
    left_out = {row: empty for row, empty in left_out.items() if row not in reasons}
    return CheckedRows(reasons, left_out, sum(row not in reasons for row in breaking))


def row_values(table: pa.Table) -> Iterator[_Values]:
    """The rows of a table of requests; text that is not UTF-8 becomes the decoding error."""
    columns = [_python_values(column) for column in table.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(table.column_names, row, strict=True))


def checked(values: _Values) -> tuple[EditRequest | str, list[str]]:
    """The request that a row asks for, or the reason why it cannot be carried out.

    Returns:
        The request or the reason, and the places of null and empty texts left out of the row.
    """
    given = {name: value for name, value in values.items() if not _is_missing(value)}
    for name in REQUIRED_COLUMNS:
        if name not in given:
            return f"{name} is {'null' if values[name] is None else 'NaN'}; give text", []
    for name, value in given.items():
        if (position := _undecodable(value)) is not None:
            return f"{name} is not UTF-8 at byte {position}; write it as UTF-8", []
    if "case_id" in given:
        given["case_id"] = _whole(given["case_id"])
        if type(given["case_id"]) not in (int, str):
            return f"case_id is {given['case_id']!r}; give a whole number or text", []
    return request_of(given)


def request_of(given: dict[str, Any]) -> tuple[EditRequest | str, list[str]]:
    """Build a request from fields, or return the reason why ``EditRequest`` refuses them.

    Returns:
        The request or the reason, and the places of null and empty texts left out. A text that is
        only measured does not prevent an edit. Portability comes in pairs: a prompt is left out
        together with its answers.
    """
    try:
        return EditRequest(**given), []
    except RequestError as error:
        filled, empty = _without_empty(given)
        if not empty:
            return str(error), []
    try:
        return EditRequest(**filled), empty
    except RequestError as error:
        return str(error), []


def _without_empty(given: _Values) -> tuple[dict[str, Any], list[str]]:
    """The fields without empty texts that are only measured, and the places of those texts."""
    filled = dict(given)
    empty: list[str] = []
    if given.get("target_true") is not None and _is_empty(given["target_true"]):
        filled["target_true"] = None
        empty.append("target_true")
    lists = {name: given[name] for name in TEXT_LISTS if isinstance(given.get(name), list)}
    asked = [lists[name] for name in _PORTABILITY if lists.get(name)]
    for name, texts in lists.items():
        beside = asked if name in _PORTABILITY else [texts]
        if not texts or len(set(map(len, beside))) > 1:
            # If answers do not match their prompts, they are kept and refused later.
            continue
        empty += [f"{name}[{i}]" for i, text in enumerate(texts) if _is_empty(text)]
        whole = [not any(map(_is_empty, row)) for row in zip(*beside, strict=True)]
        filled[name] = list(compress(texts, whole))
    return filled, empty


def _is_empty(text: Any) -> bool:
    return _is_missing(text) or (isinstance(text, str) and not text.strip())


def bytes_type(type_: pa.DataType) -> pa.DataType:
    """The type with text as bytes, including inside lists and structs; other types stay."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.large_list(bytes_type(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(bytes_type(field.type)) for field in type_])
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return pa.large_binary() if is_text else type_


class Repeats:
    """Finds rows that repeat or contradict others, in normal form; 40 bytes per row."""

    def __init__(self) -> None:
        self._rows = array("q")
        # The same for the original texts, for rows that are not in normal form.
        self._given: dict[int, tuple[bytes, ...]] = {}
        # Two digests of 16 bytes per row: one of the prompt and subject, one of the target.
        self._digests = bytearray()

    def add(self, row: int, request: EditRequest) -> None:
        """Add a valid row; rows come in ascending order."""
        self._rows.append(row)
        given = (request.prompt, request.subject, request.target_new)
        forms = (normal(given[0]), normal(given[1]), normal(given[2]))
        digests = _digests(*forms)
        if forms != given:
            pairs = zip(_digests(*given), digests, strict=True)
            self._given[row] = tuple(own if own != form else b"" for own, form in pairs)
        self._digests += b"".join(digests)

    def reasons(self) -> dict[Row, Reason]:
        """The reason why each of them is refused."""
        reasons: dict[Row, Reason] = {}
        for rows_by_target in self._groups():
            aside = self._aside(rows_by_target.values(), 1)
            for own, rows in rows_by_target.items():
                if len(rows_by_target) > 1:
                    others = (rows for other, rows in rows_by_target.items() if other != own)
                    reason = Reason(RejectionCode.CONTRADICTION, _contradiction(others, aside))
                    reasons |= dict.fromkeys(rows, reason)
                else:
                    same = f"same prompt, subject and target_new{self._aside([rows], 2)}"
                    text = f"repeats row {rows[0]}: {same}; keep one"
                    reasons |= dict.fromkeys(rows[1:], Reason(RejectionCode.DUPLICATE, text))
        return reasons

    def _aside(self, groups: Iterable[Sequence[int]], parts: int) -> str:
        """A remark about differences that are ignored, if the rows have any.

        Args:
            groups: numbers of rows.
            parts: 1: compare prompt and subject; 2: compare the target as well.
        """
        alike = (b"", b"")
        given = {self._given.get(row, alike)[:parts] for rows in groups for row in rows}
        return " except for white space or Unicode form" if len(given) > 1 else ""

    def _groups(self) -> Iterator[dict[bytes, list[Row]]]:
        """Rows with the same prompt and subject, grouped by their target."""
        digests = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 4)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        asked = digests[order, :2]
        edges = np.flatnonzero((asked[1:] != asked[:-1]).any(axis=1)) + 1
        for start, stop in zip([0, *edges], [*edges, len(order)], strict=True):
            if stop - start < 2:
                continue
            group: dict[bytes, list[Row]] = defaultdict(list)
            for place in order[start:stop].tolist():
                group[digests[place, 2:].tobytes()].append(self._rows[place])
            yield group


def _contradiction(others: Iterable[Sequence[int]], aside: str) -> str:
    named = list(islice((row for rows in others for row in rows), NAMED_ROWS + 1))
    listed = ", ".join(str(row) for row in sorted(named[:NAMED_ROWS]))
    more = ", …" if len(named) > NAMED_ROWS else ""
    same = f"same prompt and subject{aside}, another target_new"
    return f"contradicts row {listed}{more}: {same}; keep one"


def _digests(prompt: str, subject: str, target: str) -> tuple[bytes, bytes]:
    """The digest of prompt and subject, and the digest of the target."""
    # Any text may hold a NUL, so no separator is safe: the length goes in, too.
    return _digest(f"{len(prompt)} {prompt}{subject}"), _digest(target)


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
    """Convert whole numbers stored as floats, as beside missing values, to int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _undecodable(value: Any) -> int | None:
    items = value if isinstance(value, list) else (value,)
    return next((item.start for item in items if isinstance(item, UnicodeDecodeError)), None)
