"""Judges each row of a dump: the fact that it states, or what is wrong with it.

All work is done a column at a time on a batch of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.files import FACT, Dump
from jobs.facts.dump.problems import (
    EMPTY,
    EXPIRED,
    FINE,
    MAX_CHARACTERS,
    NO_TEMPLATE,
    NOT_UTF8,
    NULL,
    TOO_LONG,
    WRONG_TYPE,
    text_code,
    time_code,
)

UNDATED = np.iinfo(np.int64).min
"""Time of a row without a time: earlier than any other."""

READ = (*FACT, "updated_at", "valid_until", "target_true")
_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST_DATE = len("2026-11-23")


@dataclass(frozen=True)
class JudgedRows:
    """A batch of rows.

    Attributes:
        first: number of the first row over all files of the dump.
        codes: (rows,) uint8, ``FINE`` or the row's problem.
        facts: the rows without a problem: ``subject``, ``relation``, ``object``, all trimmed,
            ``target_true`` (null if there is none), ``time`` (int64, microseconds, or ``UNDATED``)
            and ``row``.
        controls: numbers of rows, over all files, whose only problem is a control character.
    """

    first: int
    codes: np.ndarray
    facts: pa.Table
    controls: np.ndarray


def judge(
    dump: Dump,
    *,
    as_of: datetime,
    relations: Collection[str] | None = None,
    damaged: list[str] | None = None,
) -> Iterator[JudgedRows]:
    """Judge every row of a dump by itself, in order.

    Args:
        dump: the dump.
        as_of: facts whose ``valid_until`` is at or before this time have expired; with a time zone.
        relations: the relations that have a template; None: do not check.
        damaged: receives a message for each damaged file; None: damage raises.

    Raises:
        FactDumpError: a file is damaged.
    """
    now = _microseconds(as_of)
    known = None if relations is None else pa.array(sorted(relations), pa.string())
    for batch in dump.batches(READ, damaged):
        yield _judged(batch.first, batch.table, now, known)


def trimmed(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Strip white space from a column of valid text; return one array."""
    text = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pc.utf8_trim_whitespace(text.cast(pa.string()))


def _judged(first: int, table: pa.Table, now: int, known: pa.Array | None) -> JudgedRows:
    codes = np.zeros(len(table), np.uint8)
    texts = {name: _text(table.column(name), name, codes) for name in (*FACT, "target_true")}
    times = {name: _times(table.column(name), name, codes) for name in READ[3:5]}
    if known is not None:
        without = ~_mask(pc.is_in(texts["relation"], known))
        _put(codes, without, NO_TEMPLATE)
    _put(codes, (times["valid_until"] != UNDATED) & (times["valid_until"] <= now), EXPIRED)
    fine = codes == FINE
    rows = np.arange(first, first + len(table))
    facts = pa.table(texts | {"time": pa.array(times["updated_at"]), "row": pa.array(rows)})
    facts = facts.filter(pa.array(fine))
    return JudgedRows(first, codes, facts, _with_controls(facts))


def _text(column: pa.ChunkedArray, name: str, codes: np.ndarray) -> pa.Array:
    """Return a column's trimmed text; invalid values become null and set their ``codes``."""
    nulls = _mask(column.is_null(nan_is_null=True))
    optional = name not in FACT
    if not optional:
        _put(codes, nulls, text_code(name, NULL))
    if not _is_text(column.type):
        _put(codes, ~nulls, text_code(name, WRONG_TYPE))
        return pa.nulls(len(column), pa.string())
    text, undecodable = _decoded(column)
    text = trimmed(text)
    lengths = pc.fill_null(pc.utf8_length(text), 1).to_numpy(zero_copy_only=False)
    _put(codes, undecodable, text_code(name, NOT_UTF8))
    if optional:
        text = pc.if_else(pa.array(lengths == 0), None, text)
    else:
        _put(codes, lengths == 0, text_code(name, EMPTY))
    _put(codes, lengths > MAX_CHARACTERS, text_code(name, TOO_LONG))
    return text


def _decoded(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Return text with null for invalid UTF-8, and the mask of those rows."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        bad = np.array([value is not None and not _is_utf8(value) for value in values], bool)
        good = [None if wrong else value for value, wrong in zip(values, bad, strict=True)]
        return pa.array(good, pa.binary()).cast(pa.string()), bad
    return column.combine_chunks(), np.zeros(len(column), bool)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _times(column: pa.ChunkedArray, name: str, codes: np.ndarray) -> np.ndarray:
    """(rows,) int64 microseconds since 1970; times without a zone are UTC.

    A date means its whole day: a fact valid until then is valid to the last moment of the day.
    """
    whole_day = _DAY if name == "valid_until" else timedelta()
    type_ = column.type
    if pa.types.is_null(type_):
        return np.full(len(column), UNDATED)
    if _is_text(type_):
        return _parsed_times(column, name, codes, whole_day)
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        zone = type_.tz if pa.types.is_timestamp(type_) else None
        moments = column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
        nulls = _mask(moments.is_null())
        values = pc.fill_null(moments, 0).to_numpy().copy()
        if pa.types.is_date(type_):
            values += whole_day // _MICROSECOND
        values[nulls] = UNDATED
        return values
    _put(codes, ~_mask(column.is_null(nan_is_null=True)), time_code(name))
    return np.full(len(column), UNDATED)


def _parsed_times(
    column: pa.ChunkedArray, name: str, codes: np.ndarray, whole_day: timedelta
) -> np.ndarray:
    text, undecodable = _decoded(column)
    _put(codes, undecodable, time_code(name))
    # Dumps repeat times, so each distinct one is parsed once.
    encoded = trimmed(text).dictionary_encode()
    parsed = [_parsed(value, whole_day) for value in encoded.dictionary.to_pylist()]
    moments = np.array([UNDATED if value is None else value for value in parsed] or [0], np.int64)
    indices = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    wrong = np.array([value is None for value in parsed] or [False], bool)
    _put(codes, (indices >= 0) & wrong[indices], time_code(name))
    return np.where(indices >= 0, moments[indices], UNDATED)


def _parsed(value: str, whole_day: timedelta) -> int | None:
    """Return microseconds since 1970 for an ISO 8601 time or date; None if it is neither."""
    try:
        moment = _microseconds(datetime.fromisoformat(value))
    except ValueError:
        return None
    # Added to the number, not the datetime: 9999-12-31 has no day after it.
    return moment + (whole_day if len(value) <= _LONGEST_DATE else timedelta()) // _MICROSECOND


def _microseconds(moment: datetime) -> int:
    zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (zoned - datetime(1970, 1, 1, tzinfo=UTC)) // _MICROSECOND


def _with_controls(facts: pa.Table) -> np.ndarray:
    found = np.zeros(len(facts), bool)
    for name in FACT:
        found |= _mask(pc.match_substring_regex(facts.column(name), r"\p{Cc}"))
    return facts.column("row").to_numpy()[found]


def _put(codes: np.ndarray, where: np.ndarray, code: int) -> None:
    """Set a code on rows that have none: a row keeps the first problem found."""
    codes[where & (codes == FINE)] = code


def _mask(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Convert booleans to numpy; null becomes False."""
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool, copy=False)


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))
