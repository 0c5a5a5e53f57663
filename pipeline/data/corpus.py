"""The text that second moments are computed on, cut to a token budget and split into parts.

Which tokens are counted, and which are summed together, depends only on the corpus and the budget,
never on the workers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import JobError, StorageError
from pipeline.storage import expand, read_column
from pmet.model import encode

TOKENS = 1_000_000
"""The default budget: fewer tokens than the published 100,000 articles have, but enough (arXiv
2506.04226)."""


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
    patterns: Sequence[str], tokenizer: Any, *, max_length: int, budget: int = TOKENS
) -> Corpus:
    """Read texts until ``budget`` tokens are reached; the last text is cut to meet it exactly.

    Args:
        patterns: Parquet files, globs or folders; their column ``text`` is read.
        tokenizer: the model's, a fast one.
        max_length: the number of tokens that each text is truncated to.
        budget: the number of tokens wanted.

    Raises:
        JobError: a file has no such column or cannot be read, or there is no text.
        RequestTableError: a pattern matches no file.
    """
    files: list[str] = []
    texts: list[str] = []
    sequences: list[array[int]] = []
    left = budget
    for file in expand(patterns):
        files.append(file)
        for text in _texts(file):
            sequence = array("i", encode(tokenizer, text)[: min(max_length, left)])
            texts.append(text)
            sequences.append(sequence)
            left -= len(sequence)
            if not left:
                return Corpus(files, texts, sequences, budget, max_length)
    if left == budget:
        raise JobError(f"corpus: {', '.join(patterns)} holds no text; give files that do")
    return Corpus(files, texts, sequences, budget, max_length)


def _texts(file: str) -> Iterator[str]:
    try:
        for values in read_column(file, "text"):
            yield from (t for t in values if isinstance(t, str) and t.strip())
    except StorageError as error:
        raise JobError(f"corpus: {error}") from None
