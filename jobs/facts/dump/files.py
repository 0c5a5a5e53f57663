"""Reads a fact dump: Parquet with subject, relation and object, a batch at a time.

Rows are numbered from 0 over all files, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.data import aligned, common_types
from pipeline.errors import FactDumpError, StorageError
from pipeline.storage import expand_with_columns, parquet_footer, plain_type, read_batches

FACT = ("subject", "relation", "object")
TIMES = ("updated_at", "valid_until")
OPTIONAL = (*TIMES, "source", "target_true")
BATCH_ROWS = 65_536


@dataclass(frozen=True)
class DumpFile:
    """One file of a dump.

    Attributes:
        url: its location.
        first: number of its first row over all files.
        rows: number of rows.
        stored: for each dump column that it stores, the name in the file.
        folder: columns given by the names of its folders, such as ``relation=capital/``.
        schema: the stored columns under their names in the dump.
    """

    url: str
    first: int
    rows: int
    stored: Mapping[str, str]
    folder: Mapping[str, str | None]
    schema: pa.Schema


@dataclass(frozen=True)
class Batch:
    """Rows of a dump.

    Attributes:
        first: number of the first row over all files.
        table: the requested columns, under their names in the dump.
    """

    first: int
    table: pa.Table


@dataclass(frozen=True)
class Dump:
    """A fact dump whose footers have been read and that has the required columns.

    Attributes:
        files: the readable files, in order.
        damaged: for each other file, what is wrong with it.
    """

    files: list[DumpFile]
    damaged: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Columns of all files, each with a type that fits its values in every file."""
        return common_types([_decoded(file.schema) for file in self.files])

    def batches(self, names: Sequence[str], damaged: list[str] | None = None) -> Iterator[Batch]:
        """Yield rows in order; columns as stored, dictionaries decoded, null if absent.

        Args:
            names: the columns wanted.
            damaged: receives a message for each damaged file; the rest of such a file is skipped.
                None: damage raises.

        Raises:
            FactDumpError: a file cannot be read or is damaged.
        """
        for file in self.files:
            try:
                yield from _batches(file, names)
            except StorageError as error:
                if damaged is None:
                    raise FactDumpError(f"fact dump: {error}") from None
                damaged.append(str(error))

    def aligned_batches(self) -> Iterator[Batch]:
        """Yield all columns of the rows in order, cast to ``types``.

        Raises:
            FactDumpError: a file cannot be read or is damaged.
            RequestTableError: a column has incompatible types.
        """
        types = self.types
        for file in self.files:
            for batch in Dump([file]).batches(list(file.schema.names)):
                yield Batch(batch.first, aligned(file.url, batch.table, types))


def open_dump(
    source: str | Sequence[str],
    columns: Mapping[str, str] | None = None,
    *,
    keep_damaged: bool = False,
) -> Dump:
    """Find a dump's files and read their footers.

    Args:
        source: paths, URLs, globs or folders. A folder means all Parquet files below it; folder
            names below it such as ``relation=capital`` become columns.
        columns: the dump's own column names by ours: ``{"subject": "entity"}``.
        keep_damaged: record files with damaged footers in ``damaged`` instead of raising.

    Raises:
        FactDumpError: a file is damaged or lacks a column, or the mapping has an unknown column.
        RequestTableError: no file was found.
        StorageError: the storage cannot be listed.
    """
    mapping = _mapping(columns or {})
    files: list[DumpFile] = []
    damaged: list[str] = []
    first = 0
    for url, folder in expand_with_columns(source, deep=True).items():
        try:
            schema, rows = parquet_footer(url)
        except StorageError as error:
            if not keep_damaged:
                raise FactDumpError(f"fact dump: {error}") from None
            damaged.append(str(error))
            continue
        files.append(_file(url, first, rows, schema, folder, mapping))
        first += rows
    return Dump(files, damaged)


def _mapping(columns: Mapping[str, str]) -> dict[str, str]:
    known = (*FACT, *OPTIONAL)
    for name in columns:
        if name not in known:
            raise FactDumpError(
                f"--column {name}: a dump has no such column; use one of {', '.join(known)}"
            )
    theirs = list(columns.values())
    defaults = [name for name in known if name not in columns]
    for name in theirs:
        if theirs.count(name) > 1 or (name in defaults and name in FACT):
            raise FactDumpError(f"--column: {name} is mapped to two columns; map each name to one")
    return {name: name for name in defaults if name not in theirs} | dict(columns)


def _file(
    url: str,
    first: int,
    rows: int,
    schema: pa.Schema,
    folder: Mapping[str, str | None],
    mapping: Mapping[str, str],
) -> DumpFile:
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise FactDumpError(f"{url} has two columns named {twice!r}; rename one")
    given = [*schema.names, *(name for name in folder if name not in schema.names)]
    missing = [name for name in FACT if mapping[name] not in given]
    if missing:
        raise FactDumpError(
            f"{url} has no column {', '.join(mapping[name] for name in missing)}; a fact dump "
            f"needs {', '.join(FACT)}, and this file has {', '.join(given) or 'none'}; name them "
            f"with --column {missing[0]}=NAME"
        )
    ours = _names(given, mapping)
    fields = [field.with_name(ours[field.name]).remove_metadata() for field in schema]
    # A column stored in the file overrides one from its folder name.
    added = {ours[name]: folder[name] for name in given[len(schema.names) :]}
    fields += [pa.field(name, pa.string()) for name in added]
    stored = {ours[name]: name for name in schema.names}
    return DumpFile(url, first, rows, stored, added, pa.schema(fields))


def _names(given: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Return our name for each column; a clash with a mapped name gets the prefix ``input_``."""
    theirs = {name: ours for ours, name in mapping.items() if name in given}
    names: dict[str, str] = {}
    for name in given:
        ours = theirs.get(name, name)
        while name not in theirs and (ours in theirs.values() or (ours != name and ours in given)):
            ours = f"input_{ours}"
        names[name] = ours
    return names


def _batches(file: DumpFile, names: Sequence[str]) -> Iterator[Batch]:
    wanted = [file.stored[name] for name in names if name in file.stored]
    first = file.first
    for batch in read_batches(file.url, wanted, BATCH_ROWS):
        columns = {name: _column(batch, file, name) for name in names}
        yield Batch(first, pa.table(columns))
        first += len(batch)


def _column(batch: pa.RecordBatch, file: DumpFile, name: str) -> pa.Array:
    if name in file.folder:
        return pa.repeat(pa.scalar(file.folder[name], pa.string()), len(batch))
    if name not in file.stored:
        return pa.nulls(len(batch))
    return batch.column(file.stored[name])


def _decoded(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(plain_type(field.type)) for field in schema])
