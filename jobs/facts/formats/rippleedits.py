"""RippleEdits (Cohen et al. 2023): an ``edit`` as a sentence, and six groups of tests.

A record has identifiers of subject and target, but their names only inside sentences such as "The
name of the mother of Ada is Bea." Where such a sentence can be divided in several ways ("The author
of What is Art is Bea."), the tests about the same subject decide. Tests of what follows from the
edit are portability. Tests of what must not change are neighborhood prompts where their answer is
the fact's own true target; the others are only copied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jobs.facts.formats.beside import following
from jobs.facts.formats.record import (
    Format,
    Record,
    RecordedEdit,
    RecordError,
    case_id,
    first_text,
    text,
    texts,
    without,
)

_FOLLOWING = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)
_STAYING = ("Relation_Specifity", "Relation_Specificity", "Forgetfulness")
_QUALIFIED = "is associated with|is part of|is a member of|plays in|is the capital of"
_VERB = re.compile(r" (?:is followed by|follows|is|are) ")
_PROMPTS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"The [a-z ]+ which (?P<subject>.+) (?:{_QUALIFIED}) is",
        r"The [a-z ]+ (?P<subject>[^a-z ].*) (?:has|won) is",
        # Words of the relation are in lower case, so the subject begins with the first other one.
        r"The [a-z ]+? (?:of|in|by) (?P<subject>[^a-z ].*) (?:is|are)",
        r"(?P<subject>.+) (?:follows|is followed by)",
    )
)


class _Sentence(NamedTuple):
    """A fact taken from a sentence."""

    prompt: str
    subject: str
    target: str


def matches(record: Record) -> bool:
    """Whether a record is in the format of RippleEdits."""
    edit = record.get("edit")
    return isinstance(edit, Mapping) and "prompt" in edit and "subject_id" in edit


def edit(record: Record, row: int) -> RecordedEdit:
    """Return the edit that a record asks for."""
    fact = record["edit"] if isinstance(record.get("edit"), Mapping) else {}
    subjects = set(_subjects(record, fact.get("subject_id")))
    found = _divided(text(record, "edit", "prompt"), subjects)
    truth = _truth(fact, found)
    staying = [
        prompt for prompt, answers in _tests(record, _STAYING) if truth in texts(list(answers))
    ]
    asked = [
        (prompt, answer)
        for prompt, answers in _tests(record, _FOLLOWING)
        if (answer := first_text(answers)) is not None
    ]
    request = {
        "prompt": found.prompt,
        "subject": found.subject,
        "target_new": found.target,
        "target_true": truth,
        "case_id": case_id(record, row),
        "paraphrase_prompts": [],
        "neighborhood_prompts": staying if truth is not None else [],
        **following(asked),
    }
    ids = {f"{name}": fact.get(name) for name in ("subject_id", "relation", "target_id")}
    return RecordedEdit(request, ids | without(record, "edit", "case_id"))


def _divided(sentence: str, subjects: Collection[str]) -> _Sentence:
    """Divide a sentence; ``subjects`` are the names that tests give its subject."""
    found = [part for part in _divisions(sentence) if not subjects or part.subject in subjects]
    if len(found) != 1:
        raise RecordError(
            f"the sentence can be divided into prompt, subject and target in {len(found)} ways; "
            "write it as edit requests"
        )
    return found[0]


def _divisions(sentence: str) -> Iterator[_Sentence]:
    """Yield each way to divide a sentence that ends in its target."""
    plain = sentence.strip().removesuffix(".").strip()
    for verb in _VERB.finditer(plain):
        before = plain[: verb.end() - 1]
        if (place := _place(before)) is not None:
            start, end = place
            prompt = before[:start] + "{}" + before[end:]
            yield _Sentence(prompt, before[start:end], plain[verb.end() :].strip())


def _place(prompt: str) -> tuple[int, int] | None:
    """Return where the subject stands in a prompt that the target would follow."""
    matches = (pattern.fullmatch(prompt) for pattern in _PROMPTS)
    return next((match.span("subject") for match in matches if match is not None), None)


def _subjects(record: Record, subject_id: Any) -> Iterator[str]:
    """Yield the names of a subject in the tests about it."""
    for query in _queries(record, (*_FOLLOWING, *_STAYING)):
        prompt = query.get("prompt")
        if query.get("subject_id") == subject_id and isinstance(prompt, str):
            place = _place(prompt.strip())
            if place is not None and query.get("query_type") != "two_hop":
                yield prompt.strip()[slice(*place)]


def _truth(fact: Mapping[str, Any], found: _Sentence) -> str | None:
    """Return the target before the edit, whose sentence has the same prompt."""
    previous = fact.get("previous_fact")
    sentence = previous.get("prompt") if isinstance(previous, Mapping) else None
    if not isinstance(sentence, str):
        return None
    same = (part for part in _divisions(sentence) if part[:2] == found[:2])
    return next((part.target for part in same), None)


def _tests(record: Record, groups: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield the prompts of some groups with all accepted answers."""
    for query in _queries(record, groups):
        prompt, answers = query.get("prompt"), query.get("answers")
        if isinstance(prompt, str) and isinstance(answers, list):
            yield prompt, [spelling for answer in answers for spelling in _spellings(answer)]


def _queries(record: Record, groups: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    for group in groups:
        for test in _mappings(record.get(group)):
            yield from _mappings(test.get("test_queries"))


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _spellings(answer: Any) -> list[str]:
    if not isinstance(answer, Mapping):
        return texts(answer)
    return [*texts(answer.get("value")), *texts(answer.get("aliases"))]


FORMAT = Format("rippleedits", matches, edit)
