"""The demo world: hand-written facts, the corpus built from them and edits that change them.

The tables in ``world/`` hold the facts; ``world/relations.yaml`` gives each relation's columns and
templates. Everything here is a pure function of those files and a seed.
"""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

WORLD = Path(__file__).parent / "world"

# Subjects are split once into those that an edit may change and those that only serve as neighbors,
# so no neighbor is ever an edited subject, however many requests are drawn.
CHANGEABLE_SHARE = 0.4
MIN_NEIGHBORS = 3
MAX_NEIGHBORS = 5

REQUEST_SCHEMA = pa.schema(
    [
        ("case_id", pa.int64()),
        ("relation", pa.string()),
        ("prompt", pa.string()),
        ("subject", pa.string()),
        ("target_new", pa.string()),
        ("target_true", pa.string()),
        ("paraphrase_prompts", pa.list_(pa.string())),
        ("neighborhood_prompts", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation between subjects and objects, with its templates.

    Attributes:
        name: unique name of the relation.
        table: file in ``world/`` that holds its facts.
        subject: column of the subjects.
        object: column of the objects; an empty cell means no fact.
        editable: whether edit requests are drawn from it.
        kind: template of a statement that says what a subject is.
        prompt: main template; the object follows it.
        paraphrases: further templates with the same answer.
    """

    name: str
    table: str
    subject: str
    object: str
    editable: bool
    kind: str
    prompt: str
    paraphrases: tuple[str, ...]

    @property
    def templates(self) -> tuple[str, ...]:
        """All phrasings, the main one first."""
        return (self.prompt, *self.paraphrases)


@dataclass(frozen=True)
class Fact:
    """One true fact: ``relation`` leads from ``subject`` to ``object``."""

    relation: Relation
    subject: str
    object: str

    def prompts(self) -> list[str]:
        """Return the fact in every phrasing up to its object, main one first; no trailing space."""
        return [fill(template, self.subject) for template in self.relation.templates]


def fill(template: str, subject: str) -> str:
    """Return ``template`` with the subject filled in."""
    return template.replace("{}", subject)


@cache
def relations() -> tuple[Relation, ...]:
    """Return the relations, in the order of ``relations.yaml``."""
    rows = yaml.safe_load((WORLD / "relations.yaml").read_text(encoding="utf-8"))
    return tuple(Relation(**row | {"paraphrases": tuple(row["paraphrases"])}) for row in rows)


@cache
def facts() -> tuple[Fact, ...]:
    """Return every fact, relation by relation, in the order of the tables."""
    return tuple(fact for relation in relations() for fact in _facts_of(relation))


def statements() -> list[str]:
    """Return the corpus: every fact in every phrasing, and what each subject is, as sentences."""
    stated = [sentence(f"{prompt} {fact.object}") for fact in facts() for prompt in fact.prompts()]
    kinds = [sentence(fill(fact.relation.kind, fact.subject)) for fact in facts()]
    return stated + list(dict.fromkeys(kinds))


def sentence(text: str) -> str:
    """Return ``text`` with a capital first letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def requests(seed: int = 0, count: int = 200) -> list[dict[str, Any]]:
    """Draw edit requests, each of which makes one fact false.

    No subject is edited twice and no neighborhood prompt is about an edited subject. The first
    requests of a larger ``count`` are those of a smaller one.

    Args:
        seed: selects the facts that change, their new objects and the neighborhood prompts.
        count: number of requests.

    Returns:
        Rows with the columns of ``REQUEST_SCHEMA``.

    Raises:
        ValueError: the world has fewer changeable facts than ``count``.
    """
    rng = random.Random(seed)
    changeable = _changeable_subjects(rng)
    neighbors = _facts_by_answer(fact for fact in facts() if fact.subject not in changeable)
    by_subject = _facts_by_subject(
        fact
        for fact in facts()
        if fact.relation.editable and len(neighbors[_answer(fact)]) >= MIN_NEIGHBORS
    )
    subjects = [subject for subject in changeable if subject in by_subject]
    if count > len(subjects):
        raise ValueError(
            f"{count} requests were asked for but seed {seed} gives {len(subjects)}; ask for fewer"
        )
    changed = [rng.choice(by_subject[subject]) for subject in subjects]
    rows = [_request(fact, neighbors[_answer(fact)], rng) for fact in changed[:count]]
    return [{"case_id": case_id} | row for case_id, row in enumerate(rows)]


def write_requests(path: str | Path, seed: int = 0, count: int = 200) -> None:
    """Write :func:`requests` as Parquet, one request per row."""
    pq.write_table(pa.Table.from_pylist(requests(seed, count), schema=REQUEST_SCHEMA), path)


def write_corpus(path: str | Path) -> None:
    """Write :func:`statements` as Parquet, one statement per row, in the column ``text``."""
    pq.write_table(pa.table({"text": pa.array(statements(), pa.string())}), path)


def _facts_of(relation: Relation) -> Iterator[Fact]:
    with (WORLD / relation.table).open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, strict=True):
            if row[relation.object]:
                yield Fact(relation, row[relation.subject], row[relation.object])


def _changeable_subjects(rng: random.Random) -> dict[str, None]:
    """Return a share of all subjects in drawn order (a dict for its order and quick look-up)."""
    subjects = list(dict.fromkeys(fact.subject for fact in facts()))
    rng.shuffle(subjects)
    return dict.fromkeys(subjects[: int(len(subjects) * CHANGEABLE_SHARE)])


def _answer(fact: Fact) -> tuple[str, str]:
    """Return what neighbors have in common."""
    return fact.relation.name, fact.object


def _facts_by_answer(some: Iterator[Fact]) -> dict[tuple[str, str], list[Fact]]:
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in some:
        groups[_answer(fact)].append(fact)
    return groups


def _facts_by_subject(some: Iterator[Fact]) -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in some:
        groups[fact.subject].append(fact)
    return groups


def _objects_of(relation: Relation) -> list[str]:
    """Return the distinct objects of a relation, in the order of its table."""
    return list(dict.fromkeys(fact.object for fact in facts() if fact.relation == relation))


def _request(fact: Fact, neighbors: list[Fact], rng: random.Random) -> dict[str, Any]:
    """Return the row that changes ``fact``, without its case id."""
    others = [item for item in _objects_of(fact.relation) if item != fact.object]
    near = rng.sample(neighbors, min(MAX_NEIGHBORS, len(neighbors)))
    return {
        "relation": fact.relation.name,
        "prompt": fact.relation.prompt,
        "subject": fact.subject,
        "target_new": rng.choice(others),
        "target_true": fact.object,
        "paraphrase_prompts": fact.prompts()[1:],
        "neighborhood_prompts": [rng.choice(neighbor.prompts()) for neighbor in near],
    }
