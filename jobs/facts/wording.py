"""Fills templates with facts: a batch of facts in, the columns of edit requests out.

Lists are built as Arrow builds them, from flat values and offsets; nothing loops over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.runs import places_in_runs
from jobs.facts.templates import PLACE, RelationTemplates, Templates


@dataclass(frozen=True)
class _Choice:
    """The templates of all relations for one purpose, concatenated.

    Attributes:
        before: (T,) text before the placeholder of each template.
        after: (T,) text after it.
        first: (relations,) index of each relation's first template.
        counts: (relations,) number of templates of each relation.
    """

    before: pa.Array
    after: pa.Array
    first: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> _Choice:
        flat = [text.split(PLACE) for group in texts for text in group]
        counts = np.array([len(group) for group in texts], np.int64)
        return cls(
            pa.array([before for before, _ in flat], pa.string()),
            pa.array([after for _, after in flat], pa.string()),
            np.cumsum(counts) - counts,
            counts,
        )

    def filled(self, templates: np.ndarray, texts: pa.Array) -> pa.Array:
        """Fill templates, given by index, each with one text."""
        numbers = pa.array(templates)
        before, after = self.before.take(numbers), self.after.take(numbers)
        return pc.binary_join_element_wise(before, texts, after, "")


class Wording:
    """The templates of all relations, ready to be filled."""

    def __init__(self, templates: Templates) -> None:
        """Prepare the templates."""
        self.relations = pa.array(list(templates), pa.string())
        self._prompts = list(templates.values())
        self.separates = any(r.separator is not None for r in self._prompts)
        self._targets = self._choice(lambda relation: (relation.target,))
        self._paraphrases = self._choice(lambda relation: relation.paraphrases)
        self._questions = self._choice(lambda relation: relation.question)
        self.asks = bool(self._questions.counts.any())
        self._neighbors = self._choice(lambda relation: relation.neighbors)

    def prompts(self, relations: np.ndarray) -> pa.Array:
        """Return the prompt of each row, with its ``{}``."""
        return pa.array([r.prompt for r in self._prompts], pa.string()).take(pa.array(relations))

    def targets(self, relations: np.ndarray, objects: pa.Array) -> pa.Array:
        """Return the answer of each row; null if its object is null."""
        return self._targets.filled(self._targets.first[relations], objects)

    def separators(self, relations: np.ndarray) -> pa.Array:
        """Return the separator of each row; null where its relation sets none."""
        texts = pa.array([relation.separator for relation in self._prompts], pa.string())
        return texts.take(pa.array(relations))

    def paraphrases(self, relations: np.ndarray, subjects: pa.Array) -> pa.Array:
        """Return all paraphrases of each row with the subject filled in: lists of text."""
        return _filled(self._paraphrases, relations, subjects)

    def questions(self, relations: np.ndarray, subjects: pa.Array) -> pa.Array:
        """Return all questions of each row with the subject filled in: lists of text."""
        return _filled(self._questions, relations, subjects)

    def neighborhoods(
        self, relations: np.ndarray, subjects: pa.Array, counts: np.ndarray
    ) -> pa.Array:
        """Return the neighborhood prompts of each row: its templates in turn, each with a neighbor.

        Args:
            relations: (rows,) number of each row's relation.
            subjects: the neighbors of all rows, concatenated.
            counts: (rows,) number of neighbors of each row.
        """
        rows = np.repeat(np.arange(len(relations)), counts)
        within = places_in_runs(counts)
        choices = self._neighbors.counts[relations][rows]
        numbers = self._neighbors.first[relations][rows] + within % np.maximum(choices, 1)
        # A relation without such templates has no neighbors in its rows.
        some = choices > 0
        prompts = self._neighbors.filled(numbers[some], subjects.filter(pa.array(some)))
        return _lists(prompts, np.where(self._neighbors.counts[relations] > 0, counts, 0))

    def numbers(self, relations: pa.Array) -> np.ndarray:
        """Return the number of each row's relation, which must have a template."""
        return pc.index_in(relations, self.relations).to_numpy(zero_copy_only=False)

    def _choice(self, of: Callable[[RelationTemplates], Sequence[str]]) -> _Choice:
        return _Choice.of([of(relation) for relation in self._prompts])


def _filled(choice: _Choice, relations: np.ndarray, subjects: pa.Array) -> pa.Array:
    """Fill all templates of each row with its subject: lists of text."""
    counts = choice.counts[relations]
    rows = np.repeat(np.arange(len(relations)), counts)
    numbers = choice.first[relations][rows] + places_in_runs(counts)
    return _lists(choice.filled(numbers, subjects.take(pa.array(rows))), counts)


def _lists(values: pa.Array, counts: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
