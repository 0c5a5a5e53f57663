"""Figures of generated text: its variety, and its similarity to other texts.

Fluency is the weighted entropy of word pairs and triples as ROME and MEMIT measure it (Zhang et al.
2018, arXiv 1809.05972; Meng et al. 2022, arXiv 2202.05262): it is low for a repetitive text.
Consistency is the cosine between the TF-IDF vectors of generated and of reference texts (the same
papers), with the default formulas of scikit-learn's ``TfidfVectorizer``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_NGRAMS = ((2, 2 / 3), (3, 4 / 3))
# Words and single punctuation marks, much as in the Penn Treebank's tokeniser.
_PIECES = re.compile(r"\w+|[^\w\s]")
_WORDS = re.compile(r"\b\w\w+\b")


def n_gram_entropy(text: str) -> float | None:
    """Mean of ⅔ of the entropy of word pairs and 4⁄3 of that of triples, in bits.

    None for a text of fewer than three words, which has no triple.
    """
    words = _PIECES.findall(text)
    if len(words) < max(n for n, _ in _NGRAMS):
        return None
    weighted = [weight * _entropy(words, n) for n, weight in _NGRAMS]
    return sum(weighted) / len(weighted)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


def fluency(texts: Sequence[str]) -> float | None:
    """Mean n-gram entropy of texts; None if none of them has any."""
    known = [value for text in texts if (value := n_gram_entropy(text)) is not None]
    return sum(known) / len(known) if known else None


class TfIdf:
    """Weights of words, by the documents that contain them.

    A word's weight in a text is its count times ln((1 + documents) / (1 + those with it)) + 1.
    Words are of two letters or more, in lower case.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._count, self._with = 0, Counter[str]()
        for document in documents:
            self._count += 1
            self._with.update(set(_words(document)))

    def vector(self, text: str) -> dict[str, float]:
        """The weights of a text's words, with norm 1, without words that no document has."""
        counts = Counter(word for word in _words(text) if word in self._with)
        found = {
            w: c * (math.log((1 + self._count) / (1 + self._with[w])) + 1)
            for w, c in counts.items()
        }
        length = math.sqrt(math.fsum(x * x for x in found.values()))
        return {word: x / length for word, x in found.items()}

    def similarity(self, text: str, other: str) -> float:
        """Cosine of two texts, in [0, 1]; 0 if one has no known word."""
        return _product(self.vector(text), self.vector(other))


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _product(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    # Rounding may raise the product of equal vectors a little above 1.
    return min(1.0, math.fsum(x * other[word] for word, x in one.items() if word in other))


def reference(texts: Sequence[str]) -> str:
    """Reference texts of a request as one document."""
    return " ".join(texts)


def add_consistency(
    rows: Iterable[tuple[dict[str, object], Sequence[str]]],
) -> None:
    """Add to each row, which has the generated ``text``, its ``consistency`` with its reference
    texts; None if there is nothing to compare.

    The rarity of words is computed over the reference texts of all rows.
    """
    rows = list(rows)
    documents = dict.fromkeys(reference(texts) for _, texts in rows if texts)
    weights = TfIdf(documents)
    for row, texts in rows:
        said = row.get("text")
        both = isinstance(said, str) and bool(texts)
        row["consistency"] = weights.similarity(str(said), reference(texts)) if both else None
