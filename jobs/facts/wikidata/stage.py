"""Stages Wikidata's files as a fact dump: a whole dump, or a dump brought up to date by changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.facts.dump.files import Dump
from jobs.facts.lines import LONGEST, read_lines
from jobs.facts.staged import CODE, REASON
from jobs.facts.wikidata.labels import Names, label_tables
from jobs.facts.wikidata.pages import read_pages
from jobs.facts.wikidata.reader import EntityReader, Notes, WikidataSettings
from jobs.facts.wikidata.staging import STAGED, Staging, named, numbers
from pipeline.errors import FactDumpError
from pipeline.storage import Store

_IDS = ("case_id", "subject_id", "object_id")


def stage_entities(
    files: Sequence[str], path: str, settings: WikidataSettings, *, labels: str | None = None
) -> Notes:
    """Stage JSON dumps of entities.

    Args:
        files: their paths or URLs.
        path: the staged dump, a local path.
        settings: what is taken from them.
        labels: where to write the table of all labels; None: nowhere.

    Raises:
        FactDumpError: a file is damaged.
        StorageError: a file cannot be read, or the labels cannot be written.
    """
    reader = EntityReader(settings)
    with Staging() as staging:
        for file in files:
            _add_lines(file, reader, staging)
        staging.close()
        with Names(staging.wanted.sorted()) as names:
            names.add(label_tables(staging.labels_path))
            _write(path, (named(t, names, settings.spoken) for t in staging.rows()))
        if labels is not None:
            _keep(staging.labels_path, labels)
    return reader.notes


def stage_changes(
    files: Sequence[str],
    path: str,
    settings: WikidataSettings,
    *,
    previous: Dump | None = None,
    labels: str | None = None,
) -> Notes:
    """Stage incremental dumps: the facts of changed entities, and of all others as they were.

    Args:
        files: their paths or URLs, oldest first: the last page of an entity counts.
        path: the staged dump, a local path.
        settings: what is taken from them.
        previous: the dump before the changes, written from Wikidata; None: stage only the facts of
            changed entities.
        labels: a table of labels, for objects that have not changed.

    Raises:
        FactDumpError: a file is damaged, or ``previous`` was not written from Wikidata.
        StorageError: a file cannot be read.
    """
    reader = EntityReader(settings)
    last: dict[int, int] = {}
    with Staging() as staging:
        for file in files:
            for page in read_pages(file):
                number, label, rows = reader.read(page.text, page.title)
                if number is not None:
                    last[number] = staging.turns
                staging.add(number, label, rows)
        staging.close()
        if previous is not None:
            _refuse_others(previous)
            for table in _previous(previous):
                staging.wanted.add(numbers(table.column("object_id")))
        with Names(staging.wanted.sorted()) as names:
            if labels is not None:
                names.add(label_tables(labels))
            if previous is not None:
                names.add(_labels_in(previous))
            names.add(label_tables(staging.labels_path))
            _write(path, _changed(staging, names, settings, last, previous))
    reader.notes.entities["entities that changed"] = len(last)
    return reader.notes


def _add_lines(file: str, reader: EntityReader, staging: Staging) -> None:
    for count, line in enumerate(read_lines(file, longest=LONGEST), 1):
        where = f"{file}, line {count}"
        if line is None:
            staging.add(None, None, [reader.too_long(where, LONGEST)])
            continue
        text = line.strip().removesuffix(b",")
        if text in (b"", b"[", b"]"):
            continue
        staging.add(*reader.read(text, where))


def _changed(
    staging: Staging,
    names: Names,
    settings: WikidataSettings,
    last: dict[int, int],
    previous: Dump | None,
) -> Iterator[pa.Table]:
    """Yield the facts of ``previous`` whose subject has not changed, then those of the changes."""
    changed = pa.array(sorted(last), pa.int64())
    for table in _previous(previous) if previous is not None else ():
        stays = pc.invert(pc.is_in(numbers(table.column("subject_id")), changed))
        yield _renamed(table.filter(stays), names)
    turns = pa.array(sorted(last.values()), pa.int64())
    for table in staging.rows():
        # Rows without a subject are pages that could not be read.
        counts = pc.or_(pc.is_in(table.column("turn"), turns), pc.is_null(table["subject_id"]))
        yield named(table.filter(counts), names, settings.spoken)


def _previous(dump: Dump) -> Iterator[pa.Table]:
    for batch in dump.batches([*STAGED.names[:-2]]):
        nothing = pa.nulls(len(batch.table), pa.string())
        table = batch.table.append_column(CODE, nothing).append_column(REASON, nothing)
        try:
            yield table.cast(STAGED)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise FactDumpError(
                f"{dump.files[0].url}: its columns are not those that --as-dump writes ({error})"
            ) from None


def _renamed(table: pa.Table, names: Names) -> pa.Table:
    """Replace objects by their newest names."""
    newest = names.of(numbers(table.column("object_id")))
    column = pc.coalesce(newest, table.column("object").combine_chunks())
    return table.set_column(table.schema.get_field_index("object"), "object", column)


def _labels_in(dump: Dump) -> Iterator[pa.Table]:
    """Yield the labels that a dump itself contains."""
    for table in _previous(dump):
        for name in ("subject", "object"):
            ids = numbers(table.column(f"{name}_id"))
            found = pa.table({"id": ids, "label": table.column(name)})
            yield found.filter(pc.and_(ids.is_valid(), found["label"].is_valid()))


def _refuse_others(dump: Dump) -> None:
    for file in dump.files:
        lacking = [name for name in _IDS if name not in file.schema.names]
        if lacking:
            raise FactDumpError(
                f"{file.url} has no column {lacking[0]}; --previous needs the dump that "
                "--as-dump wrote from Wikidata"
            )


def _write(path: str, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(path, STAGED, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _keep(path: str, url: str) -> None:
    """Copy a local file to where the user wants it."""
    folder, _, name = url.rpartition("/")
    with Path(path).open("rb") as source, Store(folder or ".").write_stream(name) as target:
        shutil.copyfileobj(source, target, 1 << 20)
