"""CounterFact (Meng et al. 2022), also as used by MEMIT: one ``requested_rewrite`` per record."""

from __future__ import annotations

from typing import Any

from jobs.facts.formats.beside import portability
from jobs.facts.formats.record import Edit, Format, Record, case_id, text, without

_PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts")


def matches(record: Record) -> bool:
    """Whether a record is in CounterFact's format."""
    return isinstance(record.get("requested_rewrite"), dict)


def edit(record: Record, row: int) -> Edit:
    """Return the edit that a record asks for."""
    request, extra = rewritten(record)
    # Some copies nest all fields inside the rewrite.
    fields = extra | without(record, "requested_rewrite")
    request["case_id"] = case_id(fields, row)
    for name in _PROMPTS:
        request[name] = fields.get(name) or []
    request |= portability(fields)
    return Edit(request, without(fields, "case_id", *_PROMPTS))


def rewritten(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``requested_rewrite`` into the request and all other fields, including identifiers."""
    rewrite = record.get("requested_rewrite")
    rewrite = rewrite if isinstance(rewrite, dict) else {}
    new, true = (_target(rewrite, name) for name in ("target_new", "target_true"))
    inside = {"requested_rewrite": rewrite | {"target_new": new, "target_true": true}}
    request = {
        "prompt": text(record, "requested_rewrite", "prompt"),
        "subject": text(record, "requested_rewrite", "subject"),
        "target_new": text(inside, "requested_rewrite", "target_new", "str"),
        "target_true": None
        if true.get("str") is None
        else text(inside, "requested_rewrite", "target_true", "str"),
    }
    extra = {
        "relation_id": rewrite.get("relation_id"),
        "target_new_id": new.get("id"),
        "target_true_id": true.get("id"),
    }
    return request, extra | without(rewrite, *request, "relation_id")


def _target(rewrite: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a target with its ``str`` and ``id``; some copies have only the text."""
    target = rewrite.get(name)
    if isinstance(target, str):
        return {"str": target}
    return target if isinstance(target, dict) else {}


FORMAT = Format("counterfact", matches, edit)
