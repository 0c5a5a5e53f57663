"""Reads the records of a data set of edits from JSON, JSON Lines, CSV or Parquet, a whole file."""

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
"""Key for the surplus fields of a CSV row that has more fields than the header."""
_TABLES = (".csv", ".tsv")
_DELIMITERS = (",", ";", "\t")


def is_parquet(file: str) -> bool:
    """Whether a file starts like Parquet or is named like it.

    Raises:
        StorageError: the file cannot be read.
    """
    return file.endswith(".parquet") or read_file(file, limit=len(PARQUET)) == PARQUET


def read_records(file: str, folder: Columns) -> list[Any]:
    """Return the records of a file, with the columns that its folder names give them.

    Raises:
        FactDumpError: the file cannot be read, or is neither JSON nor a table.
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
    """Return the records inside wrapper objects: ``{"version": 1, "data": [{…}, …]}``.

    An object that is not a record is a wrapper if exactly one of its values is a list of objects,
    or if its only value is an object; anything else is returned unchanged.
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
            f"{file}: not Parquet, JSON or JSON Lines ({error}); write it again, or if it is CSV "
            "name it .csv"
        ) from None


def _of_json(text: str) -> Iterator[Any]:
    """Yield the records of a JSON list, of JSON Lines, or a single record."""
    if text.lstrip().startswith("["):
        yield from parse_records(text)
        return
    try:
        yield parse_records(text)
        return
    except ValueError:
        # Try JSON Lines; on an error the loop names the line.
        lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield parse_records(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _of_csv(file: str, text: str) -> list[dict[Any, Any]]:
    """Parse CSV rows: empty fields are null, lists are JSON, whole-number case ids are int."""
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
            f"{file}: line {rows.line_num} is not valid CSV ({error}); write it again, quoted"
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
    """Parse a list written as JSON; return other text unchanged."""
    if not value.lstrip().startswith("["):
        return [value]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
