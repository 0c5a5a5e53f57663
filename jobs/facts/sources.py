"""Converts a source of any kind: finds out what it is, stages what is not a fact dump, converts it.

Kinds are fact dumps, data sets of edits (``formats``) and Wikidata's files (``wikidata``). A fact
dump or a data set may be a table in another form than Parquet (``tables``).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.facts.convert import convert_dump
from jobs.facts.dataset import FORMATS, convert_dataset, is_dataset
from jobs.facts.dump.files import FACT, Dump, open_dump
from jobs.facts.lines import blocks, open_stream
from jobs.facts.output import Conversion, output_urls, refuse_among
from jobs.facts.staged import write_dump
from jobs.facts.tables.arrow import INFO, SPLITS, STATE, read_saved_dataset
from jobs.facts.tables.lakes import METADATA, newest_metadata, read_delta, read_iceberg
from jobs.facts.tables.stage import stage_batches, stage_text
from jobs.facts.tables.text import first_records, kind_of_text
from jobs.facts.templates import Templates, load_templates
from pipeline.errors import FactDumpError
from pipeline.storage import (
    Columns,
    Store,
    attempt,
    expand_with_columns,
    is_marked_parquet,
    opened,
    refuse_foreign_file,
    refuse_input,
)

if TYPE_CHECKING:
    from jobs.facts.wikidata.reader import WikidataSettings

DUMP, WIKIDATA, CHANGES = "dump", "wikidata", "wikidata-changes"
KINDS = (DUMP, WIKIDATA, CHANGES, *FORMATS)
LANGUAGES = ("en", "mul")
"""Languages of labels unless set: ``mul`` is Wikidata's label for all languages."""

_HEAD = 4096
_NAMES = {DUMP: "fact dump", WIKIDATA: "Wikidata dump", CHANGES: "Wikidata changes"}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion; the names are those of the command line.

    Attributes:
        format: one of ``KINDS``; None: detect it.
        templates: the templates file.
        previous: the previous dump.
        only_changed: skip facts that ``previous`` also contains.
        column: the dump's own column names by ours.
        as_of: the time at which facts must hold; now if None.
        as_dump: write a fact dump instead of edit requests.
        languages: languages of Wikidata's labels; empty: ``LANGUAGES``.
        instance_of: classes of Wikidata's entities; empty: all.
        labels: the table of Wikidata's labels.
    """

    format: str | None = None
    templates: str | None = None
    previous: str | None = None
    only_changed: bool = False
    column: Mapping[str, str] = field(default_factory=dict)
    as_of: datetime | None = None
    as_dump: bool = False
    languages: Sequence[str] = ()
    instance_of: Sequence[str] = ()
    labels: str | None = None

    def refuse(self, *names: str, reason: str) -> None:
        """Refuse some of the options if they are given.

        Raises:
            FactDumpError: naming the first one.
        """
        for name in names:
            if getattr(self, name):
                raise FactDumpError(f"--{name.replace('_', '-')} {reason}")


_OF_DUMPS = ("templates", "previous", "only_changed", "column", "as_of", "as_dump")
_OF_WIKIDATA = ("languages", "instance_of", "labels")


def convert_source(source: str, output: str, options: ConvertOptions) -> Conversion:
    """Convert facts to edit requests, or with ``as_dump`` to a fact dump.

    Args:
        source: a path, a URL, a folder or a glob.
        output: the Parquet file to write, a path or a URL.
        options: the options; those that the kind of source does not have are refused.

    Raises:
        FactDumpError: an option is wrong, the source cannot be read, or no row can be converted.
        StorageError: a file cannot be read or written.
    """
    if options.format is not None and options.format not in KINDS:
        raise FactDumpError(
            f"--format: {options.format!r} is not a format; use one of {', '.join(KINDS)}"
        )
    with _as_parquet(source) as parquet:
        if parquet is not None:
            return _convert_any(source, parquet, output, options)
    files = expand_with_columns(source, deep=True)
    kind = options.format or wikidata_kind(next(iter(files)))
    if kind in (WIKIDATA, CHANGES):
        _refuse_outputs(source, output, files, options)
        return _convert_wikidata(source, list(files), output, options, kind)
    options.refuse(*_OF_WIKIDATA, reason=f"is for Wikidata; {source} is something else")
    if _is_text_dump(files, options):
        _refuse_outputs(source, output, files, options)
        with tempfile.TemporaryDirectory() as folder, _named(folder, source):
            stage_text(files, folder, options.column)
            return _convert(open_dump(folder, options.column), source, output, options, DUMP)
    return _convert_any(source, source, output, options)


def _convert_any(source: str, files: str, output: str, options: ConvertOptions) -> Conversion:
    """Convert Parquet, which may be staged elsewhere, or a data set of edits."""
    found = expand_with_columns(files, deep=True)
    kind = options.format
    if kind is None and is_dataset(found, renamed=bool(options.column)):
        kind = next(iter(FORMATS))
    if kind in FORMATS:
        reason = f"is for fact dumps; {source} is a data set of edits"
        options.refuse(*_OF_DUMPS, *_OF_WIKIDATA, reason=reason)
        refuse_among(output, [source])
        with _named(files, source):
            return convert_dataset(files, output, format_name=options.format)
    options.refuse(*_OF_WIKIDATA, reason=f"is for Wikidata; {source} is a fact dump")
    _refuse_outputs(source, output, found, options)
    with _named(files, source):
        return _convert(open_dump(files, options.column), source, output, options, DUMP)


@contextmanager
def _as_parquet(source: str) -> Iterator[str | None]:
    """A local folder with a table's rows as Parquet; None if the source is no such table."""
    read = _reader(source)
    if read is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        stage_batches(source, read(source), folder)
        yield folder


def _reader(source: str) -> Callable[[str], Iterable[pa.RecordBatch]] | None:
    """Return what reads a saved data set, a Delta or an Iceberg table; None for anything else."""
    if source.endswith(METADATA):
        return read_iceberg
    fs, path = opened(source)
    # Over HTTP, asking whether something is a folder would download it.
    if "http" in fs.protocol or not attempt("look for", source, fs.isdir, path):
        return None
    names = Store(source).entries()
    if SPLITS in names or {STATE, INFO} <= set(names):
        return read_saved_dataset
    if "_delta_log" in names:
        return read_delta
    return read_iceberg if "metadata" in names and newest_metadata(source) else None


def _is_text_dump(files: Mapping[str, Columns], options: ConvertOptions) -> bool:
    """Whether the first file is CSV or JSON Lines with facts, not edits."""
    file, folder = next(iter(files.items()))
    if options.format not in (None, DUMP) or kind_of_text(file) is None:
        return False
    if options.format == DUMP:
        return True
    records = first_records(file)
    if not records or any(f.matches(records[0]) for f in FORMATS.values()):
        return False
    return bool(options.column) or all(name in (*records[0], *folder) for name in FACT)


def wikidata_kind(file: str) -> str | None:
    """Return the kind of a file of Wikidata's, None for any other file.

    Raises:
        FactDumpError: the file is compressed, and damaged at its beginning.
        StorageError: it cannot be read.
    """
    if file.endswith(".parquet"):
        return None
    with open_stream(file) as stream:
        head = next(blocks(file, stream), b"")[:_HEAD]
    if re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<mediawiki[\s>]", head):
        return CHANGES
    begins = re.match(rb"\s*(\[\s*)?\{", head)
    typed = re.search(rb'"type"\s*:\s*"(item|property|lexeme)"', head[:600])
    numbered = re.search(rb'"id"\s*:\s*"[QPL][1-9]', head[:600])
    return WIKIDATA if begins and typed and numbered else None


def _refuse_outputs(
    source: str, output: str, files: Collection[str], options: ConvertOptions
) -> None:
    """Refuse outputs that would replace what is not theirs, before anything is read."""
    if options.only_changed and options.previous is None:
        raise FactDumpError("--only-changed needs the previous dump; give it with --previous")
    inputs = [p for p in (options.templates, options.previous, options.labels) if p is not None]
    refuse_input(output, inputs)
    refuse_among(output, [p for p in (source, options.previous) if p is not None])
    output_urls(output, files)


def _convert(
    dump: Dump, source: str, output: str, options: ConvertOptions, kind: str
) -> Conversion:
    """Convert a dump that has been opened."""
    if options.as_dump:
        options.refuse("only_changed", "as_of", reason="has no effect with --as-dump")
        if kind != CHANGES:
            options.refuse("previous", reason="has no effect with --as-dump")
        return write_dump(dump, output, source_format=_NAMES[kind])
    previous = None
    if options.previous is not None:
        previous = open_dump(options.previous, options.column)
    return convert_dump(
        dump,
        _templates(source, options),
        output,
        previous=previous,
        as_of=options.as_of,
        only_changed=options.only_changed,
        may_be_none=options.only_changed,
        source_format=_NAMES[kind],
    )


def _templates(source: str, options: ConvertOptions) -> Templates:
    if options.templates is None:
        raise FactDumpError(
            f"{source} is a fact dump, so its relations need templates; give a templates file "
            "with --templates"
        )
    return load_templates(options.templates)


def _convert_wikidata(
    source: str, files: Sequence[str], output: str, options: ConvertOptions, kind: str
) -> Conversion:
    from jobs.facts.wikidata.stage import stage_changes, stage_entities

    settings = _settings(options)
    options.refuse("column", reason="is for fact dumps; Wikidata's have columns of their own")
    previous = None
    if kind == CHANGES and options.previous is not None:
        previous = open_dump(options.previous)
    with (
        tempfile.TemporaryDirectory() as folder,
        _named(f"{folder}/staged.parquet", source) as path,
    ):
        if kind == CHANGES:
            notes = stage_changes(files, path, settings, previous=previous, labels=options.labels)
        else:
            if options.labels is not None:
                _refuse_labels(options.labels, [*files, output])
            notes = stage_entities(files, path, settings, labels=options.labels)
        # Wikidata's own end times were judged at this time.
        at = replace(options, as_of=None if options.as_dump else settings.as_of)
        found = _convert(open_dump(path), source, output, at, kind)
    return replace(found, notes=notes.lines())


def _settings(options: ConvertOptions) -> WikidataSettings:
    from jobs.facts.wikidata.reader import WikidataSettings

    if options.templates is None:
        raise FactDumpError(
            "Wikidata's properties need templates; give a templates file whose relations are "
            "properties, such as P19, with --templates"
        )
    properties = list(load_templates(options.templates))
    _check(properties, r"P[1-9]\d*", f"{options.templates}: relation", "P19")
    _check(options.instance_of, r"Q[1-9]\d*", "--instance-of", "Q5")
    languages = options.languages or LANGUAGES
    _check(languages, r"[a-z]{2,}(-[a-z0-9]+)*", "--languages", "en,mul")
    return WikidataSettings(
        properties, languages, options.instance_of, options.as_of or datetime.now(UTC)
    )


def _check(values: Sequence[str], pattern: str, what: str, example: str) -> None:
    for value in values:
        if not re.fullmatch(pattern, value):
            raise FactDumpError(
                f"{what} {value!r} is not known to Wikidata; write it like {example}"
            )


def _refuse_labels(labels: str, others: Sequence[str]) -> None:
    folder, _, name = labels.rpartition("/")
    store = Store(folder or ".")
    refuse_input(store.join(name), others)
    refuse_foreign_file(store, name, is_marked_parquet)


@contextmanager
def _named(path: str, source: str) -> Iterator[str]:
    """Name the source instead of the staged file in errors."""
    try:
        yield path
    except FactDumpError as error:
        raise FactDumpError(str(error).replace(path, source)) from None
