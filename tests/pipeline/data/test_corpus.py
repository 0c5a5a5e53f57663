"""The corpus: truncated at its token budget, in the order of its files, and split into parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.corpus import Corpus, read_corpus
from pipeline.errors import JobError, RequestTableError
from pmet.model.tokenization import encode

TEXTS = ["Tremeth is a city in Dokain.", " ", "Furis lies in Zaiter, they say.", "A.", "B."]
SPOKEN = [text for text in TEXTS if text.strip()]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two files with the texts split between them."""
    pq.write_table(pa.table({"text": [*TEXTS[:2], None], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": TEXTS[2:]}), tmp_path / "b.parquet")
    return tmp_path


def test_texts_are_read_in_order_and_cut(files: Path, golden_tokenizer: Any) -> None:
    corpus = read_corpus([str(files)], golden_tokenizer, max_length=5)
    assert corpus.texts == SPOKEN
    assert [tuple(s) for s in corpus.sequences] == [encode(golden_tokenizer, t)[:5] for t in SPOKEN]
    assert corpus.files == [str(files / "a.parquet"), str(files / "b.parquet")]
    assert corpus.tokens == sum(map(len, corpus.sequences))


def test_the_budget_is_met_to_the_token_and_nothing_more_is_read(
    files: Path, golden_tokenizer: Any
) -> None:
    lengths = [len(encode(golden_tokenizer, text)) for text in SPOKEN]
    (files / "c.parquet").write_bytes(b"never opened")
    for budget in (1, lengths[0], lengths[0] + 1, sum(lengths)):
        corpus = read_corpus([str(files)], golden_tokenizer, max_length=99, budget=budget)
        assert corpus.tokens == budget
    with pytest.raises(JobError, match=r"c\.parquet"):
        read_corpus([str(files)], golden_tokenizer, max_length=99, budget=sum(lengths) + 1)


def test_texts_are_spread_over_the_corpus_and_stay_in_order(
    tmp_path: Path, golden_tokenizer: Any
) -> None:
    texts = [f"{number} lies in Zaiter, they say." for number in range(2000)]
    pq.write_table(pa.table({"text": texts[:900]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": texts[900:]}), tmp_path / "b.parquet")

    def read(budget: int) -> Corpus:
        return read_corpus(
            [str(tmp_path)], golden_tokenizer, max_length=99, budget=budget, spread=True
        )

    corpus = read(1000)
    assert corpus.tokens == 1000
    numbers = [int(text.split()[0]) for text in corpus.texts]
    assert numbers == sorted(numbers)
    # A tenth of the texts, hardly more in one tenth of the corpus than in another.
    tenths = Counter(number // 200 for number in numbers)
    assert len(tenths) == 10
    assert max(tenths.values()) < 3 * min(tenths.values())
    assert read(1000).texts == corpus.texts
    # Those of a smaller budget are among those of a larger one.
    assert {*read(500).texts} < {*read(1000).texts}
    # A corpus with fewer tokens is read as it is otherwise.
    whole = read_corpus([str(tmp_path)], golden_tokenizer, max_length=99)
    assert read(10**6).texts == whole.texts == texts
    assert read(10**6).sequences == whole.sequences


def test_the_digest_follows_the_texts_alone(files: Path, golden_tokenizer: Any) -> None:
    def digest(**changes: int) -> str:
        given = {"max_length": 99, "budget": 999} | changes
        return read_corpus([str(files / "*.parquet")], golden_tokenizer, **given).digest

    whole = digest()
    assert digest(budget=9999) == whole
    assert digest(budget=1) != whole
    (files / "a.parquet").rename(files / "0.parquet")
    assert digest() == whole
    pq.write_table(pa.table({"text": TEXTS[2:]}), files / "c.parquet")
    assert digest() != whole


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_parts_are_runs_of_about_as_many_tokens(count: int) -> None:
    sequences: Any = [[i] * (i % 7 + 1) for i in range(40)]
    corpus = Corpus([], [], sequences, 10**6, 7)
    parts = corpus.parts(count)
    assert [s for part in parts for s in part] == sequences
    assert len(parts) <= count
    assert all(parts)
    if count < 40:
        assert len(parts) == count
        sizes = [sum(map(len, part)) for part in parts]
        assert max(sizes) - min(sizes) <= 14


def test_a_corpus_without_text_is_refused(tmp_path: Path, golden_tokenizer: Any) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["", " \n"]}), file)
    with pytest.raises(JobError, match="holds no text; give files that do"):
        read_corpus([str(file)], golden_tokenizer, max_length=9)
    pq.write_table(pa.table({"words": ["x"]}), file)
    with pytest.raises(JobError, match="has no column text; it has words"):
        read_corpus([str(file)], golden_tokenizer, max_length=9)
    with pytest.raises(RequestTableError, match="matches no file"):
        read_corpus([str(tmp_path / "*.txt")], golden_tokenizer, max_length=9)
