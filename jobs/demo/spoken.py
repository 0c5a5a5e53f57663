"""The world in everyday words: facts that a pretrained model knows, and requests to change them.

Which facts a model knows is found by asking it. Neighbors are facts that it knows as well, with the
same answer.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import yaml

from jobs.demo.world import REQUEST_SCHEMA, WORLD, Fact, facts, fill

ASKED = 24
"""Facts of each relation that a model is asked for, at most."""
MOST_NEIGHBORS = 4
SCHEMA = REQUEST_SCHEMA.append(pa.field("question_prompts", pa.list_(pa.string())))


@dataclass(frozen=True)
class Spoken:
    """A relation in everyday words; each text has one ``{}`` for the subject.

    Attributes:
        prompt: a sentence that the object completes.
        paraphrases: others.
        question: the question for it.
    """

    prompt: str
    paraphrases: tuple[str, ...]
    question: str

    @property
    def templates(self) -> tuple[str, ...]:
        """All phrasings of the sentence, the main one first."""
        return (self.prompt, *self.paraphrases)


@cache
def spoken() -> Mapping[str, Spoken]:
    """The relations by name."""
    rows = yaml.safe_load((WORLD / "spoken.yaml").read_text(encoding="utf-8"))
    return {
        name: Spoken(row["prompt"], tuple(row["paraphrases"]), row["question"])
        for name, row in rows.items()
    }


def candidates(seed: int = 0) -> list[Fact]:
    """Facts to ask a model for: some of each relation, drawn by seed."""
    random_, by_relation = random.Random(seed), defaultdict(list)
    for fact in facts():
        if fact.relation.name in spoken():
            by_relation[fact.relation.name].append(fact)
    drawn = []
    for some in by_relation.values():
        random_.shuffle(some)
        drawn += some[:ASKED]
    return drawn


def question_of(fact: Fact) -> tuple[str, str]:
    """The sentence to complete for a fact, and its object."""
    return fill(spoken()[fact.relation.name].prompt, fact.subject), fact.object


def requests_among(known: Sequence[Fact], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests that make known facts false, of all relations in turn.

    No subject is edited twice, and no neighborhood prompt is about an edited subject.

    Args:
        known: facts that the model knows.
        count: number of requests, if there are as many.
        seed: draws their new objects.

    Returns:
        Rows with the columns of ``SCHEMA``.
    """
    random_ = random.Random(seed)
    edited = _in_turn(known, count)
    subjects = {fact.subject for fact in edited}
    return [_request(fact, number, known, subjects, random_) for number, fact in enumerate(edited)]


def statements(subjects: Sequence[str]) -> list[str]:
    """The facts of the world in everyday words, without those about some subjects."""
    left_out = set(subjects)
    return [
        f"{fill(template, fact.subject)} {fact.object}."
        for fact in facts()
        if fact.relation.name in spoken() and fact.subject not in left_out
        for template in spoken()[fact.relation.name].templates
    ]


def _in_turn(known: Sequence[Fact], count: int) -> list[Fact]:
    """Facts about different subjects, one of each relation after the other."""
    queues: dict[str, list[Fact]] = defaultdict(list)
    for fact in known:
        queues[fact.relation.name].append(fact)
    for name, own in queues.items():
        # The other half serves as neighbors; without another object there is nothing to change to.
        several = len({fact.object for fact in own}) > 1
        queues[name] = own[: -(-len(own) // 2)] if several else []
    chosen: dict[str, Fact] = {}
    while len(chosen) < count and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < count:
                fact = queue.pop(0)
                chosen.setdefault(fact.subject, fact)
    return list(chosen.values())


def _request(
    fact: Fact, number: int, known: Sequence[Fact], edited: set[str], random_: random.Random
) -> dict[str, Any]:
    own = spoken()[fact.relation.name]
    others = sorted(
        {f.object for f in known if f.relation == fact.relation and f.object != fact.object}
    )
    near = [
        question_of(other)[0]
        for other in known
        if other.relation == fact.relation
        and other.object == fact.object
        and other.subject not in edited
    ]
    return {
        "case_id": number,
        "relation": fact.relation.name,
        "prompt": own.prompt,
        "subject": fact.subject,
        "target_new": random_.choice(others),
        "target_true": fact.object,
        "paraphrase_prompts": [fill(template, fact.subject) for template in own.paraphrases],
        "neighborhood_prompts": near[:MOST_NEIGHBORS],
        "question_prompts": [fill(own.question, fact.subject)],
    }
