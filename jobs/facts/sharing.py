"""Facts of one subject that are stated after the same text, and so share one key.

The update can write one value for a key, so the facts get one target together
(docs/method.md#several-facts-of-one-subject); the more there are, the fewer of them are learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.partitions import pair_hash
from jobs.facts.templates import PLACE, Templates
from pmet import EditRequest


def of_requests(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Places of the requests that share a key, in groups of two and more, the largest first."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        groups[request.subject, beginning(request.prompt)].append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def beginning(prompt: str) -> str:
    """The text of a prompt before its subject."""
    return prompt.partition(PLACE)[0]


class Keys:
    """The keys of a dump's facts, as hashes: facts whose hashes are equal share a key.

    Args:
        rows: number of rows of the dump.
        templates: the prompt of each relation.
    """

    def __init__(self, rows: int, templates: Templates) -> None:
        self._hashes = np.zeros(rows, np.uint64)
        self._relations = pa.array(list(templates), pa.string())
        # With a character, as an empty text has no hash.
        texts = [f"{beginning(one.prompt)}{PLACE}" for one in templates.values()]
        self._beginnings = pa.array(texts, pa.string())

    def add(self, facts: pa.Table) -> None:
        """Add facts, each with its subject, a relation that has a template, and its row."""
        beginnings = self._beginnings.take(pc.index_in(facts.column("relation"), self._relations))
        keys = pa.table({"subject": facts.column("subject"), "relation": beginnings})
        self._hashes[facts.column("row").to_numpy()] = pair_hash(keys)

    def groups(self, rows: np.ndarray) -> list[np.ndarray]:
        """Those of the rows that share a key, in groups of two and more, the largest first."""
        hashes = self._hashes[rows]
        order = np.argsort(hashes, kind="stable")
        _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
        largest = np.argsort(-counts, kind="stable")
        return [
            rows[order[starts[i] : starts[i] + counts[i]]] for i in largest[counts[largest] > 1]
        ]
