"""Edit requests themselves, one per record, with the column names that they have in Parquet."""

from __future__ import annotations

from jobs.facts.formats.record import (
    Edit,
    Format,
    Record,
    RecordError,
    case_id,
    text,
    with_place,
    without,
)
from pipeline.data import REQUEST_COLUMNS, REQUIRED_COLUMNS
from pmet.request import TEXT_LISTS


def matches(record: Record) -> bool:
    """Whether a record has the required columns of edit requests."""
    return all(name in record for name in REQUIRED_COLUMNS)


def edit(record: Record, row: int) -> Edit:
    """Return the edit that a record asks for."""
    if None in record:
        raise RecordError("the row has more fields than the header; quote what holds a delimiter")
    given = {name: record[name] for name in REQUEST_COLUMNS if record.get(name) is not None}
    for name in TEXT_LISTS:
        if isinstance(given.get(name), str):
            raise RecordError(f'{name} is not a list; write it as JSON: ["…", "…"]')
    prompt, subject = text(record, "prompt"), text(record, "subject")
    request = given | {
        "prompt": with_place(prompt, subject),
        "target_new": text(record, "target_new"),
    }
    if "case_id" in given:
        request["case_id"] = case_id(record, row)
    return Edit(request, without(record, *REQUEST_COLUMNS))


FORMAT = Format("requests", matches, edit)
