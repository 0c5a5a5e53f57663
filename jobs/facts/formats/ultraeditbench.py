"""UltraEditBench (Gu et al. 2025): questions with ``ans``, a rephrased and an unrelated question.

The unrelated question, ``loc``, has an answer of its own, so it is only copied.
"""

from __future__ import annotations

from jobs.facts.formats.record import (
    Format,
    Record,
    RecordedEdit,
    RecordError,
    case_id,
    text,
    texts,
    with_place,
    without,
)

_REPHRASED = ("rephrase_prompt", "rephrase")


def matches(record: Record) -> bool:
    """Whether a record is in UltraEditBench's format."""
    return all(name in record for name in ("prompt", "ans", "loc"))


def edit(record: Record, row: int) -> RecordedEdit:
    """Return the edit that a record asks for."""
    if record.get("subject") is None:
        raise RecordError("subject is missing; an edit of this kind is made at its subject")
    subject = text(record, "subject")
    request = {
        "prompt": with_place(text(record, "prompt"), subject),
        "subject": subject,
        "target_new": text(record, "ans"),
        "case_id": case_id(record, row),
        "paraphrase_prompts": [p for name in _REPHRASED for p in texts(record.get(name))],
        "neighborhood_prompts": [],
    }
    return RecordedEdit(
        request, without(record, "subject", "prompt", "ans", "case_id", *_REPHRASED)
    )


FORMAT = Format("ultraeditbench", matches, edit)
