"""MQuAKE (Zhong et al. 2023): a list ``requested_rewrite`` per record, each item an edit.

The multi-hop questions of a record are copied to each of its edits.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.facts.formats.counterfact import rewritten
from jobs.facts.formats.record import Edit, Format, Record, case_id, without


def matches(record: Record) -> bool:
    """Whether a record is in MQuAKE's format."""
    return isinstance(record.get("requested_rewrite"), list)


def parts(record: Record) -> Iterator[Record]:
    """Yield the record once per rewrite; the record itself if it has none."""
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        yield record
        return
    for rewrite in rewrites:
        yield {**record, "requested_rewrite": rewrite}


def edit(record: Record, row: int) -> Edit:
    """Return the edit that a record's rewrite asks for; its question is a paraphrase."""
    request, extra = rewritten(record)
    question = record["requested_rewrite"].get("question")
    request["case_id"] = case_id(record, row)
    request["paraphrase_prompts"] = [] if question is None else [question]
    request["neighborhood_prompts"] = []
    extra.pop("question", None)
    return Edit(request, extra | without(record, "requested_rewrite", "case_id"))


FORMAT = Format("mquake", matches, edit, parts)
