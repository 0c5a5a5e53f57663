"""Questions that data sets ask about an edit: ``locality`` must not change, ``portability``
follows.

Both are groups of questions by kind (KnowEdit's ``Relation_Specificity``, ``Reasoning``, …), each
with its ``prompt`` and ``ground_truth``; zsRE and CounterFact with portability (Yao et al. 2023)
have one ``New Question`` with its ``New Answer``. Answers may be text, a list of spellings, or a
list of such lists; the first one is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jobs.facts.formats.record import Record, first_text, texts

_QUESTIONS = (("prompt", "ground_truth"), ("New Question", "New Answer"))


def neighborhood(record: Record, truth: str | None) -> list[str]:
    """Return the prompts of ``locality`` whose answer is the fact's own true target."""
    if truth is None:
        return []
    asked = _asked(record, "locality", "locality_prompt", "locality_ground_truth")
    return [
        prompt
        for prompts, answers in asked
        if truth.strip() in {answer.strip() for answer in texts(answers)}
        for prompt in texts(prompts)
    ]


def portability(record: Record) -> dict[str, list[str]]:
    """Return the prompts and answers of ``portability``, if any, as fields of a request."""
    asked = _asked(record, "portability", "portability_prompt", "portability_ground_truth")
    return following([pair for prompts, answers in asked for pair in _pairs(prompts, answers)])


def following(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Return prompts with their answers, which follow from an edit, as fields of a request."""
    if not pairs:
        return {}
    prompts, answers = zip(*pairs, strict=True)
    return {"portability_prompts": list(prompts), "portability_targets": list(answers)}


def _asked(record: Record, groups: str, prompt: str, answer: str) -> Iterator[tuple[Any, Any]]:
    """Yield prompts with their answers, as stored in the record."""
    yield record.get(prompt), record.get(answer)
    yield from _questions(record.get(groups))


def _questions(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the questions in a value: a question itself, or nested lists and groups of them."""
    if isinstance(value, list):
        for item in value:
            yield from _questions(item)
    if not isinstance(value, dict):
        return
    for prompt, answer in _QUESTIONS:
        if value.get(prompt) is not None:
            yield value[prompt], value.get(answer)
            return
    for group in value.values():
        yield from _questions(group)


def _pairs(prompts: Any, answers: Any) -> Iterator[tuple[str, str]]:
    """Yield each prompt with its answer; skip prompts without one."""
    several = isinstance(prompts, list) and len(prompts) > 1
    if several and isinstance(answers, list):
        both = list(zip(prompts, answers, strict=False)) if len(prompts) == len(answers) else []
    else:
        both = [(prompt, answers) for prompt in (prompts if several else [prompts])]
    for prompt, answer in both:
        question, said = first_text(prompt), first_text(answer)
        if question is not None and said is not None:
            yield question, said
