"""Keeps rows and labels on the local disk until all labels are known, then names the objects.

The source is read once: entities that come later may be the objects of earlier ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.facts.staged import CODE, REASON
from jobs.facts.wikidata.labels import SCHEMA, LabelWriter, Names, Wanted
from jobs.facts.wikidata.reader import Row
from pipeline.storage import PARQUET_MARK, read_batches

ROWS = pa.schema(
    [
        ("subject", pa.string()),
        ("relation", pa.string()),
        ("text", pa.string()),
        ("entity", pa.int64()),
        ("case_id", pa.string()),
        ("subject_id", pa.string()),
        ("valid_until", pa.date32()),
        (CODE, pa.string()),
        (REASON, pa.string()),
    ]
)
STAGED = pa.schema(
    [
        ("subject", pa.string()),
        ("relation", pa.string()),
        ("object", pa.string()),
        ("case_id", pa.string()),
        ("subject_id", pa.string()),
        ("object_id", pa.string()),
        ("valid_until", pa.date32()),
        (CODE, pa.string()),
        (REASON, pa.string()),
    ]
)
TURN = pa.field("turn", pa.int64())
BATCH = 32_768


class Staging:
    """Rows and labels of entities, in files that the end of a ``with`` block deletes.

    Attributes:
        wanted: the entities that rows refer to.
        turns: number of entities added.
        labels_path: the local file of all labels, complete after ``close``.
    """

    def __init__(self) -> None:
        self.wanted = Wanted()
        self.turns = 0
        self.labels_path = self._rows_path = ""
        self._rows: list[tuple[object, ...]] = []

    def __enter__(self) -> Staging:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._rows_path, self.labels_path = str(folder / "rows"), str(folder / "labels")
            self._row_writer = pq.ParquetWriter(
                self._rows_path, ROWS.append(TURN), compression="zstd"
            )
            stack.callback(self._row_writer.close)
            label_writer = pq.ParquetWriter(self.labels_path, SCHEMA, compression="zstd")
            stack.callback(label_writer.close)
            self._label_writer = label_writer
            self._labels = LabelWriter(label_writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, number: int | None, label: str | None, rows: Iterable[Row]) -> None:
        """Add an entity with its number, its label and its rows."""
        if number is not None and label is not None:
            self._labels.add(number, label)
        self._rows += [(*row, self.turns) for row in rows]
        self.turns += 1
        if len(self._rows) >= BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is still in memory; nothing can be added afterwards."""
        self._flush()
        self._labels.flush()
        self._row_writer.close()
        self._label_writer.add_key_value_metadata(PARQUET_MARK)
        self._label_writer.close()

    def rows(self) -> Iterator[pa.Table]:
        """Yield the rows in order: the columns of ``ROWS``, and ``turn``, the entity's place."""
        for batch in read_batches(self._rows_path, [*ROWS.names, TURN.name], BATCH):
            yield pa.Table.from_batches([batch])

    def _flush(self) -> None:
        if not self._rows:
            return
        schema = ROWS.append(TURN)
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(c, type_) for c, type_ in zip(columns, schema.types, strict=True)]
        table = pa.table(arrays, schema=schema)
        self._rows.clear()
        self.wanted.add(table.column("entity"))
        self._row_writer.write_table(table)


def named(rows: pa.Table, names: Names, languages: str) -> pa.Table:
    """Name the objects of rows.

    Args:
        rows: the columns of ``ROWS``.
        names: the names of the entities that they refer to.
        languages: the languages of labels, for reasons.

    Returns:
        The columns of ``STAGED``.
    """
    entity, text, code = (rows.column(n).combine_chunks() for n in ("entity", "text", CODE))
    refers = entity.is_valid()
    ids = identifiers(entity)
    name = names.of(entity)
    alone = pc.equal(text, "")
    joined = pc.binary_join_element_wise(text, name, " ")
    found = pc.if_else(refers, pc.if_else(alone, name, joined), text)
    missing = pc.and_(pc.and_(refers, name.is_null()), code.is_null())
    reason = pc.binary_join_element_wise(ids, f"has no label in {languages}", " ")
    columns = {
        "object": found,
        "object_id": pc.if_else(alone, ids, None),
        CODE: pc.if_else(missing, "object-without-label", code),
        REASON: pc.if_else(missing, reason, rows.column(REASON).combine_chunks()),
    }
    return pa.table(
        [columns.get(n, rows[n] if n in ROWS.names else None) for n in STAGED.names], schema=STAGED
    )


def identifiers(numbers: pa.Array) -> pa.Array:
    """Return the identifiers of entities, such as ``Q42``; null stays null."""
    letters = pc.if_else(pc.greater(numbers, 0), "Q", "P")
    return pc.binary_join_element_wise(letters, pc.abs(numbers).cast(pa.string()), "")


def numbers(identifiers: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return the numbers of identifiers; null unless of an item or a property."""
    if isinstance(identifiers, pa.ChunkedArray):
        identifiers = identifiers.combine_chunks()
    valid = pc.match_substring_regex(identifiers, r"^[QP][1-9][0-9]{0,17}$")
    own = pc.if_else(valid, identifiers, None)
    digits = pc.utf8_slice_codeunits(own, 1).cast(pa.int64())
    return pc.if_else(pc.starts_with(own, "Q"), digits, pc.negate(digits))
