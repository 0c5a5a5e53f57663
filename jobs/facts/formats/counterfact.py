"""CounterFact (Meng et al. 2022), also in the form of MEMIT: one ``requested_rewrite`` a record."""

from __future__ import annotations

from typing import Any

from jobs.facts.formats.record import Edit, Format, Record, text, without

_PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts")


def matches(record: Record) -> bool:
    """Whether a record is one of CounterFact."""
    return isinstance(record.get("requested_rewrite"), dict)


def edit(record: Record, row: int) -> Edit:
    """The edit that a record asks for."""
    request, extra = rewritten(record)
    request["case_id"] = record.get("case_id", row)
    for name in _PROMPTS:
        request[name] = record.get(name) or []
    return Edit(request, extra | without(record, "requested_rewrite", "case_id", *_PROMPTS))


def rewritten(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``requested_rewrite`` holds: the request, and its identifiers."""
    rewrite = record.get("requested_rewrite")
    has_truth = isinstance(rewrite, dict) and rewrite.get("target_true") is not None
    request = {
        "prompt": text(record, "requested_rewrite", "prompt"),
        "subject": text(record, "requested_rewrite", "subject"),
        "target_new": text(record, "requested_rewrite", "target_new", "str"),
        "target_true": text(record, "requested_rewrite", "target_true", "str")
        if has_truth
        else None,
    }
    assert rewrite is not None, "it holds a prompt"
    extra = {
        "relation_id": rewrite.get("relation_id"),
        "target_new_id": rewrite["target_new"].get("id"),
        "target_true_id": rewrite["target_true"].get("id") if has_truth else None,
    }
    return request, extra


FORMAT = Format("counterfact", matches, edit)
