"""A fact dump: Parquet with subject, relation and object, read a batch at a time.

Rows are counted over all files from 0, in the order of the files.
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
        url: where it is.
        first: its first row, counted over all files.
        rows: how many it has.
        stored: for each column of the dump that it stores, the name in the file.
        folder: columns that the names of its folders give it, as ``relation=capital/``.
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
        first: the first row, counted over all files.
        table: the columns that were asked for, under their names in the dump.
    """

    first: int
    table: pa.Table


@dataclass(frozen=True)
class Dump:
    """A fact dump whose footers have been read and whose columns are there.

    Attributes:
        files: in order, the readable ones.
        damaged: for each of the others, what is wrong with it.
    """

    files: list[DumpFile]
    damaged: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """The columns of all files together, each with a type that holds it in all of them."""
        return common_types([_decoded(file.schema) for file in self.files])

    def batches(self, names: Sequence[str], damaged: list[str] | None = None) -> Iterator[Batch]:
        """Rows in order; columns as each file stores them, dictionaries decoded, null if absent.

        Args:
            names: the columns wanted.
            damaged: takes what is wrong with files that turn out to be damaged; the rest of such
                a file is left out. Without it, damage raises.

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
        """All columns of rows in order, cast to ``types``.

        Raises:
            FactDumpError: a file cannot be read or is damaged.
            RequestTableError: a column has types that do not go together.
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
    """Find the files of a dump and read their footers.

    Args:
        source: paths, URLs, globs or folders; a folder stands for all Parquet below it, and names
            such as ``relation=capital`` of the folders below it are columns.
        columns: for a dump that names its columns otherwise, their names by ours:
            ``{"subject": "entity"}``.
        keep_damaged: note files whose footer is damaged in ``damaged``, do not refuse them.

    Raises:
        FactDumpError: a file is damaged or lacks a column, or the mapping names a column that no
            dump has.
        RequestTableError: there is no file.
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
                f"--column {name}: a dump has no such column; name one of {', '.join(known)}"
            )
    theirs = list(columns.values())
    defaults = [name for name in known if name not in columns]
    for name in theirs:
        if theirs.count(name) > 1 or (name in defaults and name in FACT):
            raise FactDumpError(f"--column: {name} cannot be two columns at once; map each to one")
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
    # What the file itself stores counts, not what its folder says.
    added = {ours[name]: folder[name] for name in given[len(schema.names) :]}
    fields += [pa.field(name, pa.string()) for name in added]
    stored = {ours[name]: name for name in schema.names}
    return DumpFile(url, first, rows, stored, added, pa.schema(fields))


def _names(given: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Our name of each column; one that bears a name that is mapped to another is ``input_…``."""
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
