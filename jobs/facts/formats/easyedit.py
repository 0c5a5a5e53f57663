"""EasyEdit (Wang et al. 2023) and its KnowEdit sets: flat records with alternative field names.

Prompts under ``locality`` whose answer is the fact's own true target are neighborhood prompts; the
others are only copied.
"""

from __future__ import annotations

from jobs.facts.formats.beside import neighborhood, portability
from jobs.facts.formats.record import (
    Edit,
    Format,
    Record,
    RecordError,
    case_id,
    first_text,
    texts,
    with_place,
    without,
)

_NAMES = {
    "prompt": ("prompt", "prompts", "text"),
    "subject": ("subject", "concept"),
    "target_new": ("target_new", "labels"),
}
_REPHRASED = ("rephrase_prompt", "rephrase", "rephrase_prompts", "paraphrase_prompts")
# Field names that edit requests do not have.
_OWN = (
    *("prompts", "text", "concept", "labels", "ground_truth", *_REPHRASED[:3]),
    *("locality", "locality_prompt", "portability", "portability_prompt"),
)


def matches(record: Record) -> bool:
    """Whether a record is in EasyEdit's format."""
    edits = all(any(name in record for name in names) for names in _NAMES.values())
    return edits and any(name in record for name in _OWN)


def edit(record: Record, row: int) -> Edit:
    """Return the edit that a record asks for."""
    prompt, subject, target = (_field(record, name) for name in _NAMES)
    truth = first_text(record.get("ground_truth"))
    request = {
        "prompt": with_place(prompt, subject),
        "subject": subject,
        "target_new": target,
        "target_true": truth,
        "case_id": case_id(record, row),
        "paraphrase_prompts": [p for name in _REPHRASED for p in texts(record.get(name))],
        "neighborhood_prompts": neighborhood(record, truth),
        **portability(record),
    }
    used = [name for names in _NAMES.values() for name in names]
    return Edit(request, without(record, *used, *_REPHRASED, "case_id"))


def _field(record: Record, name: str) -> str:
    found = next((record[key] for key in _NAMES[name] if record.get(key) is not None), None)
    if found is None:
        raise RecordError(f"{name} is missing; give text")
    value = first_text(found)
    if value is None:
        raise RecordError(f"{name} is empty or not text; give text")
    return value


FORMAT = Format("easyedit", matches, edit)
