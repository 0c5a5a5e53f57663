"""Converts public data sets of edits, and edit requests in other file formats, to edit requests.

Such data sets are small; each file is read whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.facts.check import reason_kind
from jobs.facts.dump.files import FACT
from jobs.facts.formats import (
    counterfact,
    easyedit,
    mquake,
    requests,
    rippleedits,
    ultraeditbench,
    wikibigedit,
    zsre,
)
from jobs.facts.formats.record import Format, RecordedEdit, RecordError
from jobs.facts.output import Conversion, open_outputs, output_urls, refuse_among
from jobs.facts.records import is_parquet, read_records, unwrapped
from pipeline.data import (
    REQUEST_COLUMNS,
    Reason,
    RejectionCode,
    Repeats,
    Row,
    readable,
    request_of,
    with_columns,
)
from pipeline.errors import FactDumpError, StorageError
from pipeline.storage import Columns, expand_with_columns, parquet_footer, read_batches
from pmet.request import TEXT_LISTS, EditRequest
from pmet.strict_json import repeated_key

FORMATS = {
    module.FORMAT.name: module.FORMAT
    for module in (
        *(counterfact, mquake, rippleedits, wikibigedit),
        *(zsre, easyedit, ultraeditbench, requests),
    )
}
"""Formats by name; a file has the first format that any of its records matches."""

_Converted = tuple[EditRequest, RecordedEdit, list[str]]
"""A request, the edit that it was made from, and the empty texts that were left out."""
_OF_JSON = (dict, list, bool, float)


def is_dataset(files: Mapping[str, Columns], *, renamed: bool = False) -> bool:
    """Whether files are a data set of edits, not a fact dump; for Parquet the first record decides.

    Args:
        files: the files, each with the columns that its folder names give it.
        renamed: the user maps column names, as only fact dumps allow.

    Raises:
        StorageError: the first file cannot be read.
    """
    file, folder = next(iter(files.items()))
    if not is_parquet(file):
        return True
    try:
        names = parquet_footer(file)[0].names
        if renamed or all(name in (*names, *folder) for name in FACT):
            return False
        first = next(read_batches(file, names, 1), None)
    except StorageError:
        # A damaged file is reported where it is read whole.
        return False
    records = [] if first is None else readable(pa.Table.from_batches([first])).to_pylist()
    return any(_is_record(folder | record) for record in records)


def convert_dataset(source: str, output: str, *, format_name: str | None = None) -> Conversion:
    """Write the records of a data set as edit requests, and rejected records with their reasons.

    Requests that repeat or contradict each other are rejected as in ``read_requests``.

    Args:
        source: a path, a URL or a glob.
        output: the Parquet file to write, a path or a URL.
        format_name: one of ``FORMATS``; None: detect it from the records.

    Raises:
        FactDumpError: a file is not JSON, its format is unknown, or no record can be converted.
        StorageError: the output cannot be written.
    """
    files = expand_with_columns(source, deep=True)
    urls = output_urls(output, files)
    refuse_among(output, [source])
    records = [record for file, folder in files.items() for record in _records(file, folder)]
    format_ = _format(records, source, format_name)
    parts = [part for record in records for part in _parts(record, format_)]
    outcomes = [_outcome(part, row, format_) for row, part in enumerate(parts)]
    edits = {Row(row): found for row, found in enumerate(outcomes) if not isinstance(found, str)}
    reasons = {
        Row(row): Reason(RejectionCode.INVALID, found)
        for row, found in enumerate(outcomes)
        if isinstance(found, str)
    }
    repeats = Repeats()
    for row, (request, _, _) in edits.items():
        repeats.add(row, request)
    reasons |= repeats.reasons()
    accepted = [edits[row] for row in edits if row not in reasons]
    rejected = sorted(reasons)
    with open_outputs(output) as outputs:
        outputs.write(
            _table(accepted),
            pa.table({"record": pa.array([_json(parts[row]) for row in rejected], pa.string())}),
            pa.array([reasons[row].code for row in rejected], pa.string()),
            pa.array([reasons[row].text for row in rejected], pa.string()),
            rejected,
        )
    kinds = Counter(reason_kind(*reasons[row]) for row in rejected)
    left_out = sum(len(empty) for *_, empty in accepted)
    return Conversion(format_.name, len(parts), len(accepted), 0, dict(kinds), *urls, left_out)


def _records(file: str, folder: Columns) -> list[Any]:
    """Return the records of a file, unwrapping a single object around them."""
    records = read_records(file, folder)
    if len(records) != 1 or not isinstance(records[0], dict):
        return records
    inner = unwrapped(records[0], _is_record)
    return inner if isinstance(inner, list) else [inner]


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and any(f.matches(value) for f in FORMATS.values())


def _format(records: Sequence[Any], source: str, name: str | None) -> Format:
    if not records:
        raise FactDumpError(f"{source}: there are no records; give a file with edits")
    if name is not None:
        return FORMATS[name]
    for format_ in FORMATS.values():
        if any(isinstance(record, dict) and format_.matches(record) for record in records):
            return format_
    first = records[0]
    if isinstance(first, dict) and all(name in first for name in FACT):
        raise FactDumpError(
            f"{source} is a fact dump that is not Parquet; convert it to Parquet or JSON Lines"
        )
    seen = ", ".join(map(str, list(first)[:8])) if isinstance(first, dict) else type(first).__name__
    raise FactDumpError(
        f"{source}: its records ({seen}) match no known format; set one with --format: "
        f"{', '.join(FORMATS)}"
    )


def _parts(record: Any, format_: Format) -> Iterator[Any]:
    whole = isinstance(record, dict) and repeated_key(record) is None
    return format_.parts(record) if whole else iter([record])


def _outcome(part: Any, row: int, format_: Format) -> _Converted | str:
    """Return the request that a part of a record asks for, or the reason why there is none."""
    if not isinstance(part, dict):
        return f"the record is {type(part).__name__}, not an object with fields"
    if (key := repeated_key(part)) is not None:
        return f"key {key!r} is given twice in the record; keep one of them"
    try:
        edit = format_.edit(part, row)
    except RecordError as error:
        return str(error)
    request, empty = request_of(edit.request)
    return request if isinstance(request, str) else (request, edit, empty)


def _table(accepted: Sequence[_Converted]) -> pa.Table:
    """Build the table of requests with their extra columns."""
    columns = {name: [getattr(r, name) for r, *_ in accepted] for name in REQUEST_COLUMNS}
    arrays = {
        name: pa.array(values, pa.list_(pa.string()) if name in TEXT_LISTS else pa.string())
        for name, values in columns.items()
        if name != "case_id"
    }
    arrays["case_id"] = _column(columns["case_id"])
    names = dict.fromkeys(name for _, edit, _ in accepted for name in edit.extra)
    extra = {
        _text(name): _column([edit.extra.get(name) for _, edit, _ in accepted]) for name in names
    }
    request = {name: arrays[name] for name in REQUEST_COLUMNS}
    table = with_columns(pa.table(extra), request) if extra else pa.table(request)
    # A field that no record has gets no column.
    present = [n for n in request if any(n in edit.request for _, edit, _ in accepted)]
    return table.select([*present, *(n for n in table.column_names if n not in request)])


def _column(values: Sequence[Any]) -> pa.Array:
    """Build a column: whole numbers and text unchanged, anything else as JSON."""
    given = [value for value in values if value is not None]
    if given and all(type(value) is int and abs(value) < 2**63 for value in given):
        return pa.array(values, pa.int64())
    return pa.array([None if v is None else _text(v) for v in values], pa.string())


def _text(value: Any) -> str:
    """Return text that UTF-8 can encode, with lone surrogates escaped."""
    text = _json(value) if isinstance(value, _OF_JSON) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _json(value: Any) -> str:
    # Parquet has types that JSON lacks, such as times.
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode()
