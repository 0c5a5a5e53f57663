"""A public data set of edits, as JSON or JSON Lines, converted into edit requests.

Such sets are small; a file is read whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from jobs.facts.check import reason_kind
from jobs.facts.formats import counterfact, easyedit, mquake, zsre
from jobs.facts.formats.record import Edit, Format, RecordError
from jobs.facts.output import Conversion, open_outputs, output_urls
from pipeline.errors import FactDumpError, StorageError
from pipeline.requests import REQUEST_COLUMNS, Repeats
from pipeline.schema import with_columns
from pipeline.store import expand, read_file
from pmet.errors import RequestError
from pmet.json_text import parse_records, repeated_key
from pmet.request import TEXT_LISTS, EditRequest

FORMATS = {module.FORMAT.name: module.FORMAT for module in (counterfact, mquake, zsre, easyedit)}

_PARQUET = b"PAR1"


def is_parquet(files: Sequence[str]) -> bool:
    """Whether the first of some files begins as Parquet does, or has its name.

    Raises:
        StorageError: it cannot be read.
    """
    return files[0].endswith(".parquet") or read_file(files[0], limit=4) == _PARQUET


def convert_dataset(source: str, output: str, *, format_name: str | None = None) -> Conversion:
    """Write the records of a data set as edit requests, and the others with their reasons.

    Requests that repeat or contradict each other are rejected as ``read_requests`` does.

    Args:
        source: a path, a URL or a glob.
        output: the Parquet file to write, a path or a URL.
        format_name: one of ``FORMATS``; detected from the records, if not given.

    Raises:
        FactDumpError: a file is no JSON, its format is unknown, or no record can be converted.
        StorageError: the output cannot be written.
    """
    files = expand(source)
    urls = output_urls(output, files)
    records = [record for file in files for record in _records(file)]
    format_ = _format(records, source, format_name)
    parts = [part for record in records for part in _parts(record, format_)]
    outcomes = [_outcome(part, row, format_) for row, part in enumerate(parts)]
    edits = {row: found for row, found in enumerate(outcomes) if not isinstance(found, str)}
    reasons = {row: found for row, found in enumerate(outcomes) if isinstance(found, str)}
    repeats = Repeats()
    for row, (request, _) in edits.items():
        repeats.add(row, request)
    reasons |= repeats.reasons()
    accepted = [edits[row] for row in edits if row not in reasons]
    rejected = sorted(reasons)
    with open_outputs(output) as outputs:
        outputs.write(
            _table(accepted),
            pa.table({"record": pa.array([_json(parts[row]) for row in rejected], pa.string())}),
            pa.array([reasons[row] for row in rejected], pa.string()),
            rejected,
        )
    kinds = Counter(reason_kind(reasons[row]) for row in rejected)
    return Conversion(format_.name, len(parts), len(accepted), 0, dict(kinds), *urls)


def _records(file: str) -> list[Any]:
    try:
        text = read_file(file).decode("utf-8-sig")
    except StorageError as error:
        raise FactDumpError(str(error)) from None
    except UnicodeDecodeError as error:
        raise FactDumpError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None
    try:
        return list(_parsed(text))
    except RecursionError:
        raise FactDumpError(f"{file}: nested too deeply for a data set of edits") from None
    except ValueError as error:
        raise FactDumpError(
            f"{file}: neither Parquet nor JSON nor JSON Lines ({error}); write it again"
        ) from None


def _parsed(text: str) -> Iterator[Any]:
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


def _format(records: Sequence[Any], source: str, name: str | None) -> Format:
    if not records:
        raise FactDumpError(f"{source}: no records there")
    if name is not None:
        return FORMATS[name]
    for record in records:
        for format_ in FORMATS.values():
            if isinstance(record, dict) and format_.matches(record):
                return format_
    first = records[0]
    seen = ", ".join(list(first)[:8]) if isinstance(first, dict) else type(first).__name__
    raise FactDumpError(
        f"{source}: its records ({seen}) are of no known format; name one with --format: "
        f"{', '.join(FORMATS)}"
    )


def _parts(record: Any, format_: Format) -> Iterator[Any]:
    whole = isinstance(record, dict) and repeated_key(record) is None
    return format_.parts(record) if whole else iter([record])


def _outcome(part: Any, row: int, format_: Format) -> tuple[EditRequest, Edit] | str:
    """The request that a part of a record asks for, or the reason why there is none."""
    if not isinstance(part, dict):
        return f"the record is {type(part).__name__}, not an object with fields"
    if (key := repeated_key(part)) is not None:
        return f"key {key!r} is given twice in the record; keep one of them"
    try:
        edit = format_.edit(part, row)
        return EditRequest(**edit.request), edit
    except (RecordError, RequestError) as error:
        return str(error)


def _table(accepted: Sequence[tuple[EditRequest, Edit]]) -> pa.Table:
    """Requests with what travels along."""
    columns = {name: [getattr(r, name) for r, _ in accepted] for name in REQUEST_COLUMNS}
    arrays = {
        name: pa.array(values, pa.list_(pa.string()) if name in TEXT_LISTS else pa.string())
        for name, values in columns.items()
        if name != "case_id"
    }
    arrays["case_id"] = _column(columns["case_id"])
    names = dict.fromkeys(name for _, edit in accepted for name in edit.extra)
    extra = {_text(name): _column([edit.extra.get(name) for _, edit in accepted]) for name in names}
    request = {name: arrays[name] for name in REQUEST_COLUMNS}
    table = with_columns(pa.table(extra), request) if extra else pa.table(request)
    # What a format never tells is no column.
    told = [n for n in request if any(n in edit.request for _, edit in accepted)]
    return table.select([*told, *(n for n in table.column_names if n not in request)])


def _column(values: Sequence[Any]) -> pa.Array:
    """Whole numbers or text as they are, anything else as JSON."""
    given = [value for value in values if value is not None]
    if given and all(type(value) is int and abs(value) < 2**63 for value in given):
        return pa.array(values, pa.int64())
    return pa.array([None if v is None else _text(v) for v in values], pa.string())


def _text(value: Any) -> str:
    """Text that UTF-8 holds: lone surrogates are escaped."""
    text = value if isinstance(value, str) else _json(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()
