"""The text that second moments are computed on, cut to a token budget and split into parts.

Which tokens are counted, and which are summed together, depends only on the corpus and the budget,
never on the workers.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import JobError, StorageError
from pipeline.storage import expand, read_column
from pmet.model import encode

TOKENS = 1_000_000
"""The default budget: fewer tokens than the published 100,000 articles have, but enough (arXiv
2506.04226)."""
_ROOM = 16
"""Characters held for each token wanted: more than any token of ordinary text has."""
_MOST_READ = 2**30
"""Characters of a corpus that texts are drawn from, at most."""


@dataclass(frozen=True)
class Corpus:
    """Ordinary text, in the order of its files, up to a budget.

    Attributes:
        files: the Parquet files that it was read from.
        texts: the texts that were read; white space alone is skipped.
        sequences: the counted tokens of each text, int32.
        budget: the number of tokens wanted.
        max_length: the number of tokens that each text is truncated to.
    """

    files: list[str]
    texts: list[str]
    sequences: list[array[int]]
    budget: int
    max_length: int

    @property
    def tokens(self) -> int:
        """The number of counted tokens: the budget, or fewer if the corpus is smaller."""
        return sum(map(len, self.sequences))

    @property
    def digest(self) -> str:
        """SHA-256 of the texts."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def parts(self, count: int) -> list[list[array[int]]]:
        """Split the sequences into at most ``count`` runs of similar token counts, none empty."""
        total, before = self.tokens, 0
        parts: list[list[array[int]]] = [[] for _ in range(count)]
        for sequence in self.sequences:
            parts[before * count // total].append(sequence)
            before += len(sequence)
        return [part for part in parts if part]


def read_corpus(
    patterns: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    budget: int = TOKENS,
    spread: bool = False,
) -> Corpus:
    """Read texts until ``budget`` tokens are reached; the last text is cut to meet it exactly.

    Args:
        patterns: Parquet files, globs or folders; their column ``text`` is read.
        tokenizer: the model's, a fast one.
        max_length: the number of tokens that each text is truncated to.
        budget: the number of tokens wanted.
        spread: take texts from the whole corpus, drawn under a fixed seed, instead of the first
            ones; the order is that of the files in either case.

    Raises:
        JobError: a file has no such column or cannot be read, or there is no text.
        RequestTableError: a pattern matches no file.
    """
    files: list[str] = []
    drawn = _drawn(_all_texts(patterns, files), budget) if spread else None
    taken: dict[int, tuple[str, array[int]]] = {}
    left = budget
    for number, text in enumerate(_all_texts(patterns, files)) if drawn is None else drawn:
        sequence = array("i", encode(tokenizer, text)[: min(max_length, left)])
        taken[number] = (text, sequence)
        left -= len(sequence)
        if not left:
            break
    if left == budget:
        raise JobError(f"corpus: {', '.join(patterns)} holds no text; give files that do")
    texts, sequences = zip(*(taken[number] for number in sorted(taken)), strict=True)
    return Corpus(files, list(texts), list(sequences), budget, max_length)


def _drawn(texts: Iterable[str], budget: int) -> list[tuple[int, str]]:
    """Some of the texts with their numbers, in random order, and hardly more than are needed.

    Kept are those with the lowest random numbers, as many as have room: so each text is as likely
    to be kept as any other, however many there are.
    """
    random_, kept, held, read = random.Random(0), list[tuple[float, int, str]](), 0, 0
    for number, text in enumerate(texts):
        # The texts with the highest numbers are on top.
        heapq.heappush(kept, (-random_.random(), number, text))
        held, read = held + len(text), read + len(text)
        while held > budget * _ROOM + len(kept[0][2]):
            held -= len(heapq.heappop(kept)[2])
        if read > _MOST_READ:
            break
    return [(number, text) for _, number, text in sorted(kept, reverse=True)]


def _all_texts(patterns: Sequence[str], files: list[str]) -> Iterator[str]:
    """The texts of all files; each file's name is added to ``files`` when it is opened."""
    for file in expand(patterns):
        files.append(file)
        yield from _texts(file)


def _texts(file: str) -> Iterator[str]:
    try:
        for values in read_column(file, "text"):
            yield from (t for t in values if isinstance(t, str) and t.strip())
    except StorageError as error:
        raise JobError(f"corpus: {error}") from None
