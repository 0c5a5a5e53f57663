"""MQuAKE (Zhong et al. 2023): a list ``requested_rewrite`` a record, each of which is an edit.

The multi-hop questions of a record travel along with each of its edits.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.facts.formats.counterfact import rewritten
from jobs.facts.formats.record import Edit, Format, Record, case_id, without


def matches(record: Record) -> bool:
    """Whether a record is one of MQuAKE."""
    return isinstance(record.get("requested_rewrite"), list)


def parts(record: Record) -> Iterator[Record]:
    """The record once for each of its rewrites; itself where it has none."""
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        yield record
        return
    for rewrite in rewrites:
        yield {**record, "requested_rewrite": rewrite}


def edit(record: Record, row: int) -> Edit:
    """The edit that a rewrite of a record asks for; its question is a paraphrase."""
    request, extra = rewritten(record)
    question = record["requested_rewrite"].get("question")
    request["case_id"] = case_id(record, row)
    request["paraphrase_prompts"] = [] if question is None else [question]
    request["neighborhood_prompts"] = []
    extra.pop("question", None)
    return Edit(request, extra | without(record, "requested_rewrite", "case_id"))


FORMAT = Format("mquake", matches, edit, parts)
