"""Stages tables of any kind as Parquet files in a local folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.facts.dump.files import FACT
from jobs.facts.staged import CODE, REASON
from jobs.facts.tables.text import TextRow, first_records, text_rows
from pipeline.errors import FactDumpError
from pipeline.storage import Columns, plain_type

ROWS = 32_768
MOST_COLUMNS = 1_000


def stage_batches(source: str, batches: Iterable[pa.RecordBatch], folder: str) -> None:
    """Stage Arrow batches; a new file begins where the columns change.

    Args:
        source: where they come from, for errors.
        batches: the batches.
        folder: an empty local folder.

    Raises:
        FactDumpError: a column has a type that Parquet lacks, or there are no batches.
    """
    writer = _Writer(folder)
    try:
        for batch in batches:
            writer.write(_plain(batch))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise FactDumpError(f"{source} has a column that Parquet cannot hold ({error})") from None
    finally:
        writer.close()
    if not writer.count:
        raise FactDumpError(f"{source} has no rows; give a table with facts")


def stage_text(files: Mapping[str, Columns], folder: str, columns: Mapping[str, str]) -> None:
    """Stage CSV and JSON Lines; all columns become text.

    Args:
        files: the files, each with the columns that its folder names give it.
        folder: an empty local folder.
        columns: the files' own column names by ours.

    Raises:
        FactDumpError: a file is damaged, its header is wrong, or there are no rows.
        StorageError: a file cannot be read.
    """
    fact = {columns.get(name, name): name for name in FACT}
    writer = _Writer(folder)
    try:
        for file, given in files.items():
            _refuse_without(file, given, fact)
            rows = (_checked(row, given, fact) for row in text_rows(file))
            for table in _tables(rows, list(fact)):
                writer.write(table)
    finally:
        writer.close()
    if not writer.count:
        raise FactDumpError(f"{next(iter(files))} has no rows; give a table with facts")


def _refuse_without(file: str, given: Columns, fact: Mapping[str, str]) -> None:
    """Refuse a file none of whose first rows has one of the columns of a fact."""
    known = dict.fromkeys([*given, *(name for row in first_records(file) for name in row)])
    missing = [name for name in fact if name not in known]
    if known and missing:
        raise FactDumpError(
            f"{file} has no column {', '.join(missing)}; a fact dump needs {', '.join(FACT)}, and "
            f"this file has {', '.join(known)}; name them with --column {fact[missing[0]]}=NAME"
        )


class _Writer:
    """Parquet files in a folder, each with the columns of its first table."""

    def __init__(self, folder: str) -> None:
        self.count = 0
        self._folder = Path(folder)
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is None or not self._writer.schema.equals(table.schema):
            self.close()
            path = self._folder / f"{self.count:09d}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            self.count += 1
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _plain(batch: pa.RecordBatch) -> pa.Table:
    """Return a batch without views, dictionaries and metadata."""
    fields = [field.with_type(plain_type(field.type)).remove_metadata() for field in batch.schema]
    return pa.Table.from_batches([batch.replace_schema_metadata(None)]).cast(pa.schema(fields))


def _tables(rows: Iterable[Mapping[str, str | None]], fact: list[str]) -> Iterator[pa.Table]:
    """Yield rows as tables; the columns only grow, in the order of their first occurrence."""
    names: dict[str, None] = dict.fromkeys([CODE, REASON, *fact])
    waiting: list[Mapping[str, str | None]] = []
    for row in rows:
        if any(name not in names for name in row):
            row = _within(row, names)
            names |= dict.fromkeys(row)
        waiting.append(row)
        if len(waiting) == ROWS:
            yield _table(waiting, names)
            waiting = []
    if waiting:
        yield _table(waiting, names)


def _within(row: Mapping[str, str | None], names: Mapping[str, None]) -> Mapping[str, str | None]:
    """Return a row unless it needs more columns than a table may have."""
    if len({*row, *names}) <= MOST_COLUMNS:
        return row
    return {
        CODE: "too-many-fields",
        REASON: f"its fields would make more than {MOST_COLUMNS:,} columns",
    }


def _table(rows: list[Mapping[str, str | None]], names: Iterable[str]) -> pa.Table:
    columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
    return pa.table(columns)


def _checked(row: TextRow, given: Columns, fact: Mapping[str, str]) -> dict[str, str | None]:
    """Return a row's fields as text; one whose fact is not text gets the reason instead."""
    if row.code is not None:
        return {CODE: row.code, REASON: row.reason}
    fields = {name: value for name, value in given.items() if name not in row.fields}
    texts = {_clean(name): _text(value) for name, value in {**fields, **row.fields}.items()}
    for name, ours in fact.items():
        if not _is_name(row.fields.get(name)):
            reason = f"{ours} is not text; store the column as text"
            return {CODE: f"{ours}-of-a-wrong-type", REASON: reason}
    return texts


def _is_name(value: Any) -> bool:
    """Whether a value may be a name: text, a number or nothing."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool))


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return _clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _clean(text: str) -> str:
    """Return text that UTF-8 can encode, with lone surrogates escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
