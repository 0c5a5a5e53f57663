"""Rows of CSV and JSON Lines, one at a time, and what is wrong with those that cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from jobs.facts.lines import LONGEST, blocks, open_stream, read_lines
from pipeline.errors import FactDumpError
from pmet.strict_json import parse_records, repeated_key

CSV, JSON_LINES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_DELIMITERS = (",", ";", "\t")
_LONGEST_FIELD = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"


class TextRow(NamedTuple):
    """A row: its fields, or the code and the reason why it cannot be read."""

    fields: Mapping[str, Any]
    code: str | None = None
    reason: str | None = None


def kind_of_text(file: str) -> str | None:
    """Return the ending of a text table, without that of its compression; None for other files."""
    path = PurePosixPath(file)
    ending = (PurePosixPath(path.stem) if path.suffix in _PACKED else path).suffix.lower()
    return ending if ending in (*CSV, *JSON_LINES) else None


def first_records(file: str) -> list[Mapping[str, Any]]:
    """Return the first rows of a text table: of CSV the header alone; none if it is no table.

    Raises:
        FactDumpError: the file is damaged.
        StorageError: it cannot be read.
    """
    with open_stream(file) as stream:
        head = next(blocks(file, stream), b"").removeprefix(_UTF8_MARK)
    lines = head.split(b"\n")
    if kind_of_text(file) in CSV:
        header = lines[0].decode("utf-8", "replace").rstrip("\r")
        return [dict.fromkeys(next(csv.reader([header], delimiter=_delimiter(header)), []))]
    first, *others = [line for line in lines if line.strip()] or [b""]
    if (record := _record(first)) is None:
        return []
    return [record, *(found for line in others if (found := _record(line)) is not None)]


def _record(line: bytes) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def text_rows(file: str) -> Iterator[TextRow]:
    """Yield the rows of a text table.

    Raises:
        FactDumpError: the file is damaged, or its header is wrong.
        StorageError: it cannot be read.
    """
    return _csv_rows(file) if kind_of_text(file) in CSV else _json_rows(file)


def _json_rows(file: str) -> Iterator[TextRow]:
    for number, line in enumerate(read_lines(file, longest=LONGEST), 1):
        text = b"" if line is None else line.removeprefix(_UTF8_MARK) if number == 1 else line
        if line is None:
            yield _over_long(number)
        elif text.strip():
            yield _json_row(text, number)


def _json_row(line: bytes, number: int) -> TextRow:
    try:
        record = parse_records(line.decode())
    except UnicodeDecodeError as error:
        return TextRow({}, "unreadable", f"line {number} is not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        return TextRow({}, "unreadable", f"line {number} is not JSON ({_short(error)})")
    if not isinstance(record, dict):
        return TextRow({}, "unreadable", f"line {number} is not an object with fields")
    if (key := repeated_key(record)) is not None:
        return TextRow({}, "unreadable", f"line {number}: key {key!r} is given twice")
    return TextRow(record)


class _Lines:
    """The lines of a file as ``csv`` reads them; remembers an over-long one, which is empty.

    Attributes:
        number: number of the last line.
        skipped: whether an over-long line was skipped since this was last reset.
    """

    def __init__(self, file: str) -> None:
        self.number = 0
        self.skipped = False
        self._lines = read_lines(file, longest=LONGEST)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if line is None:
            self.skipped = True
            return "\n"
        text = line.removeprefix(_UTF8_MARK) if self.number == 1 else line
        return text.decode("utf-8", "surrogateescape") + "\n"


def _csv_rows(file: str) -> Iterator[TextRow]:
    lines = _Lines(file)
    header = next(lines, "")
    delimiter = _delimiter(header)
    names = next(csv.reader([header], delimiter=delimiter), [])
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FactDumpError(f"{file} has two columns named {twice!r}; rename one")
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number = lines.number + 1
            try:
                fields = next(rows, None)
            except csv.Error as error:
                yield TextRow({}, "unreadable", f"line {number} is not CSV ({_short(error)})")
                continue
            if fields is None:
                return
            if lines.skipped:
                lines.skipped = False
                yield _over_long(number)
            elif fields:
                yield _csv_row(names, fields, number)
    finally:
        csv.field_size_limit(limit)


def _csv_row(names: list[str], fields: list[str], number: int) -> TextRow:
    if len(fields) != len(names):
        reason = f"line {number} has {len(fields)} fields, the header has {len(names)}"
        return TextRow({}, "unreadable", reason)
    if any("\udc80" <= character <= "\udcff" for field in fields for character in field):
        return TextRow({}, "unreadable", f"line {number} is not UTF-8")
    return TextRow({name: field or None for name, field in zip(names, fields, strict=True)})


def _over_long(number: int) -> TextRow:
    return TextRow({}, "over-long-line", f"line {number} is longer than {LONGEST >> 20} MiB")


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
