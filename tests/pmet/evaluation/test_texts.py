"""Fluency and consistency compared with their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pmet.evaluation.texts import TfIdf, add_consistency, fluency, n_gram_entropy

DOCUMENTS = [
    "The baker bakes bread, and the bread is warm.",
    "A surveyor measures land; the land is measured.",
    "Bread and land.",
]


def entropy_of_frequencies(words: list[str], n: int) -> float:
    """As in the published code: frequencies, then Σ −p·log₂ p."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = np.array([grams.count(gram) for gram in set(grams)], float)
    shares = counts / counts.sum()
    return float(np.sum(-shares * np.log(shares) / np.log(2)))


def test_fluency_weighs_the_entropies_of_pairs_and_triples() -> None:
    text = "to be or not to be, or to be"
    words = ["to", "be", "or", "not", "to", "be", ",", "or", "to", "be"]
    entropies = [entropy_of_frequencies(words, n) for n in (2, 3)]
    expected = np.mean(np.array(entropies) * np.array([2 / 3, 4 / 3]))
    assert n_gram_entropy(text) == pytest.approx(expected)
    assert fluency([text, "one two"]) == pytest.approx(expected)


def test_what_repeats_itself_is_not_fluent() -> None:
    assert n_gram_entropy("la " * 50) == 0.0
    # Four different pairs and three triples: log₂ 4 and log₂ 3.
    assert n_gram_entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)


def test_too_short_a_text_has_no_fluency() -> None:
    assert n_gram_entropy("two words") is None
    assert fluency([]) is None
    assert fluency(["two words"]) is None


def matrix(texts: list[str]) -> np.ndarray:
    """TF-IDF as scikit-learn documents it: counts times ln((1 + n) / (1 + df)) + 1, normalised."""
    split = [[w for w in _cleaned(t) if len(w) > 1] for t in texts]
    vocabulary = sorted({w for words in split[: len(DOCUMENTS)] for w in words})
    counts = np.array([[words.count(w) for w in vocabulary] for words in split], float)
    documents = counts[: len(DOCUMENTS)]
    idf = np.log((1 + len(DOCUMENTS)) / (1 + (documents > 0).sum(0))) + 1
    weighted = counts * idf
    return weighted / np.linalg.norm(weighted, axis=1, keepdims=True)


def _cleaned(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def test_consistency_is_the_cosine_of_tf_idf_vectors() -> None:
    said = "the baker measures bread and unheard wool"
    vectors = matrix([*DOCUMENTS, said])
    weights = TfIdf(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        assert weights.similarity(said, document) == pytest.approx(vectors[i] @ vectors[-1])
    assert weights.similarity(DOCUMENTS[0], DOCUMENTS[0]) == pytest.approx(1.0)
    assert weights.similarity("wool", DOCUMENTS[0]) == 0.0


def test_rows_are_compared_with_their_own_references() -> None:
    said = "The baker measures warm land"
    texts = [said, "wool", "land", None]
    rows: list[dict[str, object]] = [{"text": text} for text in texts]
    references = [DOCUMENTS[:1], DOCUMENTS[1:], [], DOCUMENTS[:1]]
    add_consistency(zip(rows, references, strict=True))
    documents = [DOCUMENTS[0], " ".join(DOCUMENTS[1:])]
    expected = TfIdf(documents).similarity(said, DOCUMENTS[0])
    assert [row["consistency"] for row in rows] == [expected, 0.0, None, None]
    assert expected != TfIdf(documents[:1]).similarity(said, DOCUMENTS[0])
