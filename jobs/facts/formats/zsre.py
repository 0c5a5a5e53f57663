"""zsRE in the form of MEND (Mitchell et al. 2022), with the ``subject`` that ROME added.

The question ``src`` is edited from ``answers`` to ``alt``. ``loc`` is an unrelated question whose
answer is ``loc_ans``, not the fact's true target, so it is not a neighborhood prompt; it is only
copied. EasyEdit's files add ``portability``.
"""

from __future__ import annotations

from jobs.facts.formats.beside import neighborhood, portability
from jobs.facts.formats.record import (
    Edit,
    Format,
    Record,
    case_id,
    first_text,
    text,
    texts,
    with_place,
    without,
)


def matches(record: Record) -> bool:
    """Whether a record is in zsRE's format."""
    return "src" in record and ("alt" in record or "answers" in record)


def edit(record: Record, row: int) -> Edit:
    """Return the edit that a record asks for."""
    subject = text(record, "subject")
    truth = first_text(record.get("answers"))
    request = {
        "prompt": with_place(text(record, "src"), subject),
        "subject": subject,
        "target_new": text(record, "alt"),
        "target_true": truth,
        "case_id": case_id(record, row),
        "paraphrase_prompts": texts(record.get("rephrase")),
        "neighborhood_prompts": neighborhood(record, truth),
        **portability(record),
    }
    return Edit(request, without(record, "subject", "src", "alt", "case_id", "rephrase"))


FORMAT = Format("zsre", matches, edit)
