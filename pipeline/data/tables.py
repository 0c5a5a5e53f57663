"""Tables: the input edit requests, and the targets that pass between the stages.

Shape letters: E requests, D model width.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from pipeline.data.conversions import conversion_of_columns, conversion_of_text, is_text
from pipeline.data.rejections import Rejection
from pipeline.data.requests import REQUIRED_COLUMNS, Requests, bytes_type, check_rows
from pipeline.data.rows import Place, Row
from pipeline.errors import RequestTableError, StorageError
from pipeline.storage import Columns, expand_with_columns, map_parquet
from pmet.request import EditRequest

SEPARATOR = "separator"
"""Column of what stands between the prompts of a request and their targets."""
FIRST_LOSS = "first_loss"
"""Column of the loss before the first step, in tables of targets and of results."""


@dataclass(frozen=True)
class RequestTable:
    """The contents of the request files; each row is either accepted or rejected.

    Attributes:
        requests: the accepted requests; as read, in the order of the files and their rows.
        rows: the input row of each accepted request, counted over all files from 0.
        table: all input rows, in order; dictionary-encoded columns are decoded.
        rejected: the other rows, ascending.
        left_out: for each row, the null and empty texts left out of it: ``paraphrase_prompts[1]``.
        breaking: how many prompts end in a line break.
    """

    requests: Sequence[EditRequest]
    rows: Sequence[Row]
    table: pa.Table
    rejected: list[Rejection]
    left_out: Mapping[Row, list[str]] = field(default_factory=dict)
    breaking: int = 0

    @property
    def notes(self) -> list[str]:
        """Notes on edited rows that may not be what their author meant."""
        found = []
        if self.left_out:
            texts = sum(map(len, self.left_out.values()))
            row, first = next(iter(self.left_out.items()))
            more = "; …" if len(self.left_out) > 1 else ""
            found.append(
                f"null or empty texts left out of requests: {texts} in {len(self.left_out)} rows "
                f"(row {row}: {', '.join(first)}{more}); the requests are edited"
            )
        if self.breaking:
            found.append(
                f"prompts that end in a line break: {self.breaking}; it is part of the prompt, and "
                "the target follows without a space"
            )
        return found

    def chosen(self, places: Sequence[Place], rejected: list[Rejection]) -> RequestTable:
        """The same input with other rejections; ``places`` lists the accepted requests to keep, in
        order."""
        rows = array("q", (self.rows[place] for place in places))
        assert isinstance(self.requests, Requests)
        staying = set(rows)
        return replace(
            self,
            requests=self.requests.of_rows(rows),
            rows=cast(Sequence[Row], rows),
            rejected=rejected,
            left_out={row: texts for row, texts in self.left_out.items() if row in staying},
        )

    def rejected_table(self) -> pa.Table:
        """The input columns of the rejected rows, with ``row`` (int64), ``code`` and ``reason``.

        The code is a `RejectionCode`, the reason a sentence.

        Bytes that are not UTF-8 are written as ``\\xNN``, so that any reader can open the table.
        """
        rows = pa.array([rejection.row for rejection in self.rejected], pa.int64())
        reasons = pa.array([rejection.reason for rejection in self.rejected], pa.string())
        codes = pa.array([rejection.code for rejection in self.rejected], pa.string())
        columns = {"row": rows, "code": codes, "reason": reasons}
        return with_columns(readable(self.table.take(rows)), columns)


def read_requests(patterns: str | Sequence[str], separator: str | None = None) -> RequestTable:
    """Read the edit requests of Parquet files and check every row.

    A row is rejected if ``EditRequest`` refuses it, if it repeats an earlier one (same prompt,
    subject and new target), or if it contradicts others (same prompt and subject, different new
    target): then all of them are rejected. White space and Unicode spelling are ignored here. Null
    and empty texts in a row's lists are left out.

    Args:
        patterns: paths, URLs, globs or folders (see ``pipeline.storage.store.expand``); folder
            names below them such as ``relation=capital`` become columns.
        separator: the separator of rows that give none.

    Raises:
        RequestTableError: a file is missing, unreadable, or lacks a column; or columns of the same
            name have types that cannot be combined.
    """
    files = expand_with_columns(patterns)
    tables = [_separated(_read(file, columns), separator) for file, columns in files.items()]
    reasons, left_out, breaking = check_rows(tables)
    rows = array("q", (row for row in range(sum(map(len, tables))) if row not in reasons))
    return RequestTable(
        requests=Requests(tables, rows),
        rows=cast(Sequence[Row], rows),
        table=_concatenated(list(files), tables),
        rejected=[Rejection(row, why.text, why.code) for row, why in sorted(reasons.items())],
        left_out=left_out,
        breaking=breaking,
    )


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Add columns; an existing column of the same name is renamed to ``input_…``."""
    taken = set(table.column_names)
    names = []
    for name in table.column_names:
        kept = name
        while kept in columns or (kept != name and kept in taken):
            kept = f"input_{kept}"
        names.append(kept)
    table = table.rename_columns(names)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


class TargetArrays(NamedTuple):
    """The targets of some requests, row by row.

    Attributes:
        rows: (E,) int64, the input row of each request.
        values: (E, D) float32, the value wanted at the target layer.
        steps: (E,) int32, number of evaluations of the loss.
        losses: (E,) float32, the last loss.
        first_losses: (E,) float32, the loss before the first step; NaN where unknown, None if
            unknown for all.
    """

    rows: np.ndarray
    values: np.ndarray
    steps: np.ndarray
    losses: np.ndarray
    first_losses: np.ndarray | None = None


def targets_table(
    rows: Sequence[int] | np.ndarray,
    values: np.ndarray,
    steps: Sequence[int] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    first_losses: np.ndarray | None = None,
) -> pa.Table:
    """Build the table in which a shard of targets is stored.

    Args:
        rows: (E,) input row of each request.
        values: (E, D) float32.
        steps: (E,) number of evaluations of the loss.
        losses: (E,) last loss.
        first_losses: (E,) loss before the first step, NaN where unknown; None: unknown for all.

    Raises:
        ValueError: the shapes differ, or ``values`` is not float32.
    """
    if first_losses is None:
        first_losses = np.full(len(rows), np.nan, np.float32)
    lengths = {len(rows), len(values), len(steps), len(losses), len(first_losses)}
    if values.ndim != 2 or values.dtype != np.float32 or len(lengths) != 1:
        raise ValueError(
            f"targets need (E, D) float32 values and E rows, steps and losses, not {values.dtype} "
            f"{values.shape} with {len(rows)}, {len(steps)} and {len(losses)}"
        )
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "target": pa.FixedSizeListArray.from_arrays(flat, values.shape[1]),
            "steps": pa.array(steps, pa.int32()),
            "loss": pa.array(losses, pa.float32()),
            FIRST_LOSS: pa.array(first_losses, pa.float32()),
        }
    )


def read_targets(table: pa.Table) -> TargetArrays:
    """The arrays of a table built by ``targets_table``.

    Raises:
        StorageError: the table is not a table of targets.
    """
    wanted = {"row": pa.int64(), "steps": pa.int32(), "loss": pa.float32()}
    found = dict(zip(table.column_names, table.schema.types, strict=True))
    target = found.pop("target", None)
    # Older releases did not store it.
    kept = found.pop(FIRST_LOSS, None) == pa.float32()
    if found != wanted or not _is_vector(target) or any(c.null_count for c in table.columns):
        raise StorageError(
            f"not a table of targets: its columns are {', '.join(table.column_names) or 'none'}; "
            "delete the shard and run again"
        )
    flat = table.column("target").combine_chunks().flatten()
    return TargetArrays(
        rows=table.column("row").to_numpy(),
        values=flat.to_numpy(zero_copy_only=False).reshape(len(table), target.list_size),
        steps=table.column("steps").to_numpy(),
        losses=table.column("loss").to_numpy(),
        first_losses=table.column(FIRST_LOSS).to_numpy() if kept else None,
    )


def _is_vector(type_: pa.DataType | None) -> bool:
    return (
        type_ is not None
        and pa.types.is_fixed_size_list(type_)
        and type_.value_type == pa.float32()
    )


def _read(file: str, folder: Columns) -> pa.Table:
    """One file of requests, checked for the columns that requests need.

    Args:
        file: where it is.
        folder: columns from folder names; a stored column takes precedence.
    """
    try:
        table = map_parquet(file)
    except StorageError as error:
        if is_text(file):
            raise RequestTableError(conversion_of_text(file)) from None
        raise RequestTableError(f"requests: {error}") from None
    for name, value in folder.items():
        if name not in table.column_names:
            column = pa.repeat(pa.scalar(value, pa.string()), len(table))
            table = table.append_column(name, column)
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise RequestTableError(f"{file} has two columns named {name!r}; rename one")
    if missing := [name for name in REQUIRED_COLUMNS if name not in names]:
        raise RequestTableError(
            f"{file} has no column {', '.join(missing)}; requests need "
            f"{', '.join(REQUIRED_COLUMNS)}, and this file has {', '.join(names) or 'none'}"
            f"{conversion_of_columns(file, names)}"
        )
    return table


def _separated(table: pa.Table, separator: str | None) -> pa.Table:
    """Fill in the separator of rows that give none; without one, it follows from the script."""
    if separator is None:
        return table
    given = pa.scalar(separator, pa.string())
    if SEPARATOR not in table.column_names:
        return table.append_column(SEPARATOR, pa.repeat(given, len(table)))
    column = table.column(SEPARATOR)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    # A column of another type is no text: each of its rows is refused with a reason.
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    column = column.fill_null(given.cast(column.type)) if is_text else column
    return table.set_column(table.column_names.index(SEPARATOR), SEPARATOR, column)


def _concatenated(files: Sequence[str], tables: Sequence[pa.Table]) -> pa.Table:
    types = common_types([table.schema for table in tables])
    return pa.concat_tables(
        aligned(file, table, types) for file, table in zip(files, tables, strict=True)
    )


def common_types(schemas: Sequence[pa.Schema]) -> dict[str, pa.DataType]:
    """For each column of any file, a type that holds its values in all of them."""
    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    return {name: _common_type(name, schemas) for name in names}


def _common_type(name: str, given: Sequence[pa.Schema]) -> pa.DataType:
    """A type that holds a column of all files: promoted if Arrow can, else text."""
    schemas = [
        pa.schema([schema.field(name).with_nullable(True)])
        for schema in given
        if name in schema.names
    ]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(name).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def aligned(file: str, table: pa.Table, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Convert a table of ``file`` to exactly these columns; missing ones become null.

    Raises:
        RequestTableError: a column cannot be cast.
    """
    columns = {}
    for name, type_ in types.items():
        if name not in table.column_names:
            columns[name] = pa.nulls(len(table), type_)
            continue
        try:
            columns[name] = table.column(name).cast(type_)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            found = table.schema.field(name).type
            raise RequestTableError(
                f"column {name!r} of {file} has type {found}, which cannot be combined with the "
                "other files; write it with one type everywhere"
            ) from None
    return pa.table(columns)


def readable(table: pa.Table) -> pa.Table:
    """The table with bytes in text that are not UTF-8 written as ``\\xNN``."""
    for index, column in enumerate(table.columns):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values = column.cast(bytes_type(column.type)).to_pylist()
            escaped = pa.array([_escaped(value) for value in values], column.type)
            table = table.set_column(index, table.column_names[index], escaped)
    return table


def _escaped(value: Any) -> Any:
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
