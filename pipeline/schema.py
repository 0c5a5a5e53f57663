"""Tables: the edit requests that come in, and the targets that go between the stages.

Shape letters: E requests, D model width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.errors import RequestTableError, StorageError
from pipeline.store import expand, read_parquet
from pmet.errors import RequestError
from pmet.request import EditRequest

REQUIRED_COLUMNS = ("prompt", "subject", "target_new")
OPTIONAL_COLUMNS = ("case_id", "target_true", "paraphrase_prompts", "neighborhood_prompts")
NAMED_ROWS = 5  # of the rows that a row contradicts

_Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rejection:
    """A row that is not edited, and why.

    Attributes:
        row: number of the row over all the input files, from 0.
        reason: what is wrong with it.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class RequestTable:
    """What the request files hold; each row is either accepted or rejected.

    Attributes:
        requests: the accepted requests; as read, in the order of the files and their rows.
        rows: the input row of each accepted request, counted over all files from 0.
        table: all the input rows, in order; dictionary-encoded columns are decoded.
        rejected: the other rows, ascending.
    """

    requests: list[EditRequest]
    rows: list[int]
    table: pa.Table
    rejected: list[Rejection]

    def accepted_table(self) -> pa.Table:
        """The input columns of the accepted requests, in their order."""
        return self.table.take(pa.array(self.rows, pa.int64()))

    def rejected_table(self) -> pa.Table:
        """The input columns of the rejected rows, with ``row`` (int64) and ``reason`` (string).

        Bytes that are not UTF-8 are written as ``\\xNN``, so that any reader can open the table.
        """
        rows = pa.array([rejection.row for rejection in self.rejected], pa.int64())
        reasons = pa.array([rejection.reason for rejection in self.rejected], pa.string())
        return with_columns(readable(self.table.take(rows)), {"row": rows, "reason": reasons})


def read_requests(patterns: str | Sequence[str]) -> RequestTable:
    """Read the edit requests of Parquet files and check every row.

    A row is rejected where ``EditRequest`` refuses it, where it repeats an earlier one (same
    prompt, subject and new target), and where rows contradict each other (same prompt and
    subject, different new targets): then all of them are.

    Args:
        patterns: paths, URLs, globs or folders (see ``pipeline.store.expand``).

    Raises:
        RequestTableError: a file is missing, unreadable, or lacks a column; or the files hold
            columns of one name that cannot be put together.
    """
    files = expand(patterns)
    tables = [_read(file) for file in files]
    checked = [_request(values) for table in tables for values in _rows(table)]
    requests = {row: item for row, item in enumerate(checked) if isinstance(item, EditRequest)}
    reasons = {row: item for row, item in enumerate(checked) if isinstance(item, str)}
    reasons |= repeated(requests)
    accepted = [row for row in requests if row not in reasons]
    return RequestTable(
        requests=[requests[row] for row in accepted],
        rows=accepted,
        table=_concatenated(files, tables),
        rejected=[Rejection(row, reasons[row]) for row in sorted(reasons)],
    )


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Add columns; a column of the table that has such a name is kept as ``input_…``."""
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
        steps: (E,) int32, evaluations of the loss.
        losses: (E,) float32, the last loss.
    """

    rows: np.ndarray
    values: np.ndarray
    steps: np.ndarray
    losses: np.ndarray


def targets_table(
    rows: Sequence[int] | np.ndarray,
    values: np.ndarray,
    steps: Sequence[int] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
) -> pa.Table:
    """The table that a shard of targets is stored as.

    Args:
        rows: (E,) input row of each request.
        values: (E, D) float32.
        steps: (E,) evaluations of the loss.
        losses: (E,) last loss.

    Raises:
        ValueError: the shapes differ, or ``values`` is not float32.
    """
    lengths = {len(rows), len(values), len(steps), len(losses)}
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
        }
    )


def read_targets(table: pa.Table) -> TargetArrays:
    """The arrays that ``targets_table`` was given.

    Raises:
        StorageError: the table is not one of targets.
    """
    wanted = {"row": pa.int64(), "steps": pa.int32(), "loss": pa.float32()}
    found = dict(zip(table.column_names, table.schema.types, strict=True))
    target = found.pop("target", None)
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
    )


def _is_vector(type_: pa.DataType | None) -> bool:
    return (
        type_ is not None
        and pa.types.is_fixed_size_list(type_)
        and type_.value_type == pa.float32()
    )


def _read(file: str) -> pa.Table:
    """One file of requests, with its dictionary-encoded columns decoded."""
    try:
        table = read_parquet(file)
    except StorageError as error:
        raise RequestTableError(f"requests: {error}") from None
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise RequestTableError(f"{file} has two columns named {name!r}; rename one")
    if missing := [name for name in REQUIRED_COLUMNS if name not in names]:
        raise RequestTableError(
            f"{file} has no column {', '.join(missing)}; requests need "
            f"{', '.join(REQUIRED_COLUMNS)}, and this file has {', '.join(names) or 'none'}"
        )
    for index, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(index, names[index], column.cast(column.type.value_type))
    return table


def _rows(table: pa.Table) -> list[_Values]:
    names = [name for name in REQUIRED_COLUMNS + OPTIONAL_COLUMNS if name in table.column_names]
    columns = [_python_values(table.column(name)) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; text that is not UTF-8 becomes the error that says so."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(_bytes_type(column.type)).to_pylist()]


def _bytes_type(type_: pa.DataType) -> pa.DataType:
    """Text as bytes, also inside lists; other types stay."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.large_list(_bytes_type(type_.value_type))
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return pa.large_binary() if is_text else type_


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return error


def _request(values: _Values) -> EditRequest | str:
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


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> Any:
    """Whole numbers that were stored as floats, as they are beside missing ones, become int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _undecodable(value: Any) -> int | None:
    items = value if isinstance(value, list) else (value,)
    return next((item.start for item in items if isinstance(item, UnicodeDecodeError)), None)


def repeated(requests: Mapping[int, EditRequest]) -> dict[int, str]:
    """By row, why requests that repeat or contradict another one are rejected."""
    facts: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, request in requests.items():
        facts[request.prompt, request.subject][request.target_new].append(row)
    reasons: dict[int, str] = {}
    for rows_by_target in facts.values():
        for target, rows in rows_by_target.items():
            if len(rows_by_target) > 1:
                reasons |= dict.fromkeys(rows, _contradiction(target, rows_by_target))
            else:
                repeats = f"repeats row {rows[0]}: same prompt, subject and target_new; keep one"
                reasons |= dict.fromkeys(rows[1:], repeats)
    return reasons


def _contradiction(target: str, rows_by_target: Mapping[str, Sequence[int]]) -> str:
    others = (rows for other, rows in rows_by_target.items() if other != target)
    named = list(islice(chain.from_iterable(others), NAMED_ROWS + 1))
    listed = ", ".join(str(row) for row in sorted(named[:NAMED_ROWS]))
    more = ", …" if len(named) > NAMED_ROWS else ""
    return f"contradicts row {listed}{more}: same prompt and subject, another target_new; keep one"


def _concatenated(files: Sequence[str], tables: Sequence[pa.Table]) -> pa.Table:
    types = common_types([table.schema for table in tables])
    return pa.concat_tables(
        aligned(file, table, types) for file, table in zip(files, tables, strict=True)
    )


def common_types(schemas: Sequence[pa.Schema]) -> dict[str, pa.DataType]:
    """For each column of any file, a type that holds it in all of them."""
    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    return {name: _common_type(name, schemas) for name in names}


def _common_type(name: str, given: Sequence[pa.Schema]) -> pa.DataType:
    """A type that holds a column of all files: promoted where Arrow can, else text."""
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
    """A table of ``file`` with exactly these columns; those that it lacks are null.

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
                f"column {name!r} of {file} is {found}, which does not go together with the "
                "other files; write it with one type everywhere"
            ) from None
    return pa.table(columns)


def readable(table: pa.Table) -> pa.Table:
    """The same table, with bytes in text that are not UTF-8 written as ``\\xNN``."""
    for index, column in enumerate(table.columns):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values = column.cast(_bytes_type(column.type)).to_pylist()
            escaped = pa.array([_escaped(value) for value in values], column.type)
            table = table.set_column(index, table.column_names[index], escaped)
    return table


def _escaped(value: Any) -> Any:
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
