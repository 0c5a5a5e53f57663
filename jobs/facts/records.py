"""Records of a data set of edits, from JSON, JSON Lines, CSV or Parquet; a file is read whole."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.data import readable
from pipeline.errors import FactDumpError, StorageError
from pipeline.storage import Columns, map_parquet, read_file
from pmet.request import TEXT_LISTS
from pmet.strict_json import parse_records

PARQUET = b"PAR1"
SURPLUS = None
"""Key of the fields of a row of CSV that has more of them than its header."""
_TABLES = (".csv", ".tsv")
_DELIMITERS = (",", ";", "\t")


def is_parquet(file: str) -> bool:
    """Whether a file begins as Parquet does, or has its name.

    Raises:
        StorageError: it cannot be read.
    """
    return file.endswith(".parquet") or read_file(file, limit=len(PARQUET)) == PARQUET


def read_records(file: str, folder: Columns) -> list[Any]:
    """The records of a file, with the columns that its folders give them.

    Raises:
        FactDumpError: it cannot be read, or is neither JSON nor a table.
    """
    try:
        if is_parquet(file):
            records: list[Any] = readable(map_parquet(file)).to_pylist()
        else:
            records = _of_text(file, read_file(file))
    except StorageError as error:
        raise FactDumpError(str(error)) from None
    for record in records:
        if isinstance(record, dict):
            record.update({name: folder[name] for name in folder if name not in record})
    return records


def unwrapped(value: Any, is_record: Callable[[Any], bool]) -> Any:
    """The records inside objects around them: ``{"version": 1, "data": [{…}, …]}``.

    An object that is no record is such a wrapper where exactly one of its values is a list of
    objects, or where its only value is an object; anything else comes back as it is.
    """
    while isinstance(value, dict) and not is_record(value):
        lists = [v for v in value.values() if _holds_objects(v)]
        inner = lists if lists else [v for v in value.values() if isinstance(v, dict)]
        if len(inner) != 1 or (not lists and len(value) > 1):
            return value
        value = inner[0]
    return value


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _of_text(file: str, data: bytes) -> list[Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FactDumpError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None
    if PurePosixPath(file).suffix.lower() in _TABLES:
        return _of_csv(file, text)
    try:
        return list(_of_json(text))
    except RecursionError:
        raise FactDumpError(f"{file}: nested too deeply for a data set of edits") from None
    except ValueError as error:
        raise FactDumpError(
            f"{file}: neither Parquet nor JSON nor JSON Lines ({error}); write it again, or name "
            "it .csv if it is CSV"
        ) from None


def _of_json(text: str) -> Iterator[Any]:
    """The records of a JSON list, of lines with one record each, or a single record."""
    if text.lstrip().startswith("["):
        yield from parse_records(text)
        return
    try:
        yield parse_records(text)
        return
    except ValueError:
        # Lines of JSON, or the loop says in which line it is none.
        lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield parse_records(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _of_csv(file: str, text: str) -> list[dict[Any, Any]]:
    """The rows of a table: empty fields are null, lists are JSON, whole numbers are case ids."""
    header = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows.restkey = SURPLUS
    try:
        names = list(rows.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise FactDumpError(f"{file} has two columns named {twice!r}; rename one")
        return [{name: _of_field(name, value) for name, value in row.items()} for row in rows]
    except csv.Error as error:
        raise FactDumpError(
            f"{file}: line {rows.line_num} is no CSV ({error}); write it again, quoted"
        ) from None


def _of_field(name: str | None, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value:
        return None
    if name == "case_id" and re.fullmatch("0|[1-9][0-9]{0,17}", value):
        return int(value)
    return _of_list(value) if name in TEXT_LISTS else value


def _of_list(value: str) -> Any:
    """A list written as JSON, or the one text that it is."""
    if not value.lstrip().startswith("["):
        return [value]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
