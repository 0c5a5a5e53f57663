"""Simulated nights: a changing world of facts, written as fact dumps.

The world is the demo's, or the records of a file of edit requests in the style of CounterFact,
whose relations are identified by the phrasings that records share.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.demo.world import facts, relations, requests, write_corpus

Key = tuple[str, str]
"""Relation and subject."""


@dataclass
class World:
    """The facts that a model knows, and those that may change.

    Attributes:
        templates: content of the templates file.
        baseline: the object of every fact that the model knows.
        changeable: facts that may change.
        objects: possible objects by relation.
    """

    templates: dict[str, Any]
    baseline: dict[Key, str]
    changeable: list[Key]
    objects: dict[str, list[str]]

    def write(self, folder: Path, name: str, live: dict[Key, str]) -> None:
        """Write a dump in which the live facts have other objects than in the baseline."""
        rows = [
            {"relation": relation, "subject": subject, "object": object_}
            for (relation, subject), object_ in sorted((self.baseline | live).items())
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        (folder / "templates.yaml").write_text(yaml.safe_dump(self.templates, allow_unicode=True))


def demo_world(folder: Path) -> World:
    """Return the demo's facts; write its corpus to ``folder``."""
    write_corpus(folder / "corpus.parquet")
    known = {(fact.relation.name, fact.subject): fact.object for fact in facts()}
    templates = {
        relation.name: {"prompt": relation.prompt, "paraphrases": list(relation.paraphrases)}
        for relation in relations()
    }
    most = 10_000
    while True:
        try:
            rows = requests(0, most)
        except ValueError:
            most -= 1
        else:
            break
    objects = {name: sorted({o for (r, _), o in known.items() if r == name}) for name in templates}
    return World(templates, known, [(row["relation"], row["subject"]) for row in rows], objects)


def counterfact_world(file: Path) -> World:
    """Return the facts of CounterFact records and of their neighborhood prompts."""
    rows = pq.read_table(file).to_pylist()
    phrasings = [_phrasings(row) for row in rows]
    relation_of = _joined(phrasings)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for texts in phrasings:
        counts[relation_of[texts[0]]].update(texts)
    templates = {
        relation: {"prompt": ordered[0], "paraphrases": ordered[1:3]}
        for relation, texts in counts.items()
        if (ordered := [text for text, _ in texts.most_common()])
    }
    changeable = [
        (relation_of[texts[0]], row["subject"]) for row, texts in zip(rows, phrasings, strict=True)
    ]
    known = {key: row["target_true"] for key, row in zip(changeable, rows, strict=True)}
    for (relation, _), row in zip(changeable, rows, strict=True):
        for prompt in row["neighborhood_prompts"]:
            for text in counts[relation]:
                before, after = text.split("{}")
                if prompt.startswith(before) and prompt.endswith(after):
                    subject = prompt[len(before) : len(prompt) - len(after)]
                    known.setdefault((relation, subject), row["target_true"])
                    break
    objects: dict[str, set[str]] = defaultdict(set)
    for (relation, _), row in zip(changeable, rows, strict=True):
        objects[relation] |= {row["target_true"], row["target_new"]}
    named = {relation: sorted(names) for relation, names in objects.items()}
    return World(templates, known, list(dict.fromkeys(changeable)), named)


class Nights:
    """A world that changes every night.

    Attributes:
        world: the world as the model knows it.
        live: facts whose current objects the model does not know.
    """

    def __init__(self, world: World, count: int, seed: int = 0) -> None:
        """Start with a first night with ``count`` new facts."""
        self.world = world
        self.live: dict[Key, str] = {}
        self._draw = random.Random(seed)
        self._waiting = list(world.changeable)
        self._draw.shuffle(self._waiting)
        self._add(count)

    def next(self, changed: float, added: float, removed: float) -> dict[Key, str]:
        """Change, add and remove fractions of the live facts; return the facts to learn.

        Removed facts return to the objects that the model knew from the start.
        """
        count, before = len(self.live), dict(self.live)
        for key in self._draw.sample(sorted(self.live), round(removed * count)):
            del self.live[key]
        for key in self._draw.sample(sorted(self.live), round(changed * count)):
            self.live[key] = self._other(key)
        self._add(round(added * count))
        now = self.world.baseline | self.live
        keys = self.live.keys() | before.keys()
        return {k: now[k] for k in sorted(keys) if before.get(k) != self.live.get(k)}

    def _add(self, count: int) -> None:
        for key in [self._waiting.pop() for _ in range(min(count, len(self._waiting)))]:
            self.live[key] = self._other(key)

    def _other(self, key: Key) -> str:
        taken = (self.world.baseline[key], self.live.get(key))
        return self._draw.choice([o for o in self.world.objects[key[0]] if o not in taken])


def _phrasings(row: dict[str, Any]) -> list[str]:
    """Return a record's templates: its prompt, and its paraphrases with the subject removed."""
    subject = row["subject"]
    texts = [p.replace(subject, "{}") for p in row["paraphrase_prompts"] if p.count(subject) == 1]
    return [row["prompt"], *(text for text in texts if text.count("{}") == 1)]


def _joined(groups: list[list[str]]) -> dict[str, str]:
    """Return a name for each text; texts that occur together in a group share one."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent.setdefault(text, text) != text:
            text = parent[text]
        return text

    for group in groups:
        for text in group:
            parent[root(text)] = root(group[0])
    return {text: root(text) for text in parent}
