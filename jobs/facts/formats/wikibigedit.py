"""WikiBigEdit (Thede et al. 2025): questions about facts that changed on Wikidata.

The hub's files have ``update`` and ``ans``; those of its pipeline ``src`` and ``alt``. As in its
own evaluation, the question asked by a persona and the multi-hop question are portability. ``loc``
is an unrelated question, whose answer is not the fact's, so it is only copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.facts.formats.beside import following
from jobs.facts.formats.record import (
    Format,
    Record,
    RecordedEdit,
    case_id,
    first_text,
    text,
    texts,
    with_place,
    without,
)

_PERSONAS = ("personas", "genv2_")
_USED = ("subject", "update", "src", "ans", "alt", "case_id", "rephrase")


def matches(record: Record) -> bool:
    """Whether a record is in WikiBigEdit's format."""
    asks = ("update" in record and "ans" in record) or ("src" in record and "alt" in record)
    return asks and "mhop" in record


def edit(record: Record, row: int) -> RecordedEdit:
    """Return the edit that a record asks for."""
    subject = text(record, "subject")
    target = text(record, "ans" if "ans" in record else "alt")
    request = {
        "prompt": with_place(text(record, "update" if "update" in record else "src"), subject),
        "subject": subject,
        "target_new": target,
        "case_id": case_id(record, row),
        "paraphrase_prompts": texts(record.get("rephrase")),
        "neighborhood_prompts": [],
        **following(list(_portability(record, target))),
    }
    return RecordedEdit(request, without(record, *_USED))


def _portability(record: Record, target: str) -> Iterator[tuple[str, str]]:
    personas = [name for name in record if isinstance(name, str) and name.startswith(_PERSONAS)]
    for name in personas:
        for prompt in texts(record[name]):
            yield prompt, target
    question, answer = first_text(record.get("mhop")), first_text(record.get("mhop_ans"))
    if question is not None and answer is not None:
        yield question, answer


FORMAT = Format("wikibigedit", matches, edit)
