"""EasyEdit (Wang et al. 2023) and its KnowEdit sets: flat records with several names for a field.

Prompts under ``locality`` ask for facts that must stay. Those whose answer is the fact's own true
one are neighborhood prompts; the others travel along only, as ``portability`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.facts.formats.record import (
    Edit,
    Format,
    Record,
    RecordError,
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


def matches(record: Record) -> bool:
    """Whether a record is one of EasyEdit."""
    return all(any(name in record for name in names) for names in _NAMES.values())


def edit(record: Record, row: int) -> Edit:
    """The edit that a record asks for."""
    prompt, subject, target = (_field(record, name) for name in _NAMES)
    truth = first_text(record.get("ground_truth"))
    request = {
        "prompt": with_place(prompt, subject),
        "subject": subject,
        "target_new": target,
        "target_true": truth,
        "case_id": record.get("case_id", row),
        "paraphrase_prompts": [p for name in _REPHRASED for p in texts(record.get(name))],
        "neighborhood_prompts": [] if truth is None else list(_neighborhood(record, truth)),
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


def _neighborhood(record: Record, truth: str) -> Iterator[str]:
    for prompts, answers in _locality(record):
        if truth.strip() in {answer.strip() for answer in texts(answers)}:
            yield from texts(prompts)


def _locality(record: Record) -> Iterator[tuple[Any, Any]]:
    """Prompts that must keep their answers, with these."""
    yield record.get("locality_prompt"), record.get("locality_ground_truth")
    groups = record.get("locality")
    for group in groups.values() if isinstance(groups, dict) else ():
        for item in group if isinstance(group, list) else [group]:
            if isinstance(item, dict):
                yield item.get("prompt"), item.get("ground_truth")


FORMAT = Format("easyedit", matches, edit)
