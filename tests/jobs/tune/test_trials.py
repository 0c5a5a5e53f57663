"""Trials: their facts, and what they are scored by."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.tune.trials import score_of, split
from jobs.tune.tuning import difference
from pipeline.data.requests import Requests
from pipeline.data.tables import RequestTable, read_requests


def table(subjects: list[str], folder: Path) -> RequestTable:
    rows = [
        {"prompt": f"{{}} likes number {i}", "subject": subject, "target_new": "tea"}
        for i, subject in enumerate(subjects)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    return read_requests(str(folder / "requests.parquet"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts")


@given(subjects=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), seed=st.integers(0))
def test_facts_are_split_by_subject(folder: Path, subjects: list[str], seed: int) -> None:
    given_table = table(subjects, folder)
    assert isinstance(given_table.requests, Requests)
    trial, judged = split(given_table, len(subjects) // 2, seed)
    assert sorted([*trial, *judged]) == list(range(len(subjects)))
    assert not {subjects[i] for i in trial} & {subjects[i] for i in judged}
    # A subject more than were asked for, at most.
    largest = max(subjects.count(subject) for subject in subjects)
    assert len(subjects) // 2 <= len(judged) < len(subjects) // 2 + largest or not trial
    assert (trial, judged) == split(given_table, len(subjects) // 2, seed)


PERFECT = dict.fromkeys(("efficacy", "generalization", "specificity"), 1.0)


def test_a_score_is_the_mean_of_two_harmonic_means() -> None:
    after = PERFECT | {"efficacy_said": 0.5, "generalization_said": 0.5, "locality": 0.5}
    assert score_of({}, after, 0.05).value == pytest.approx(0.75)
    # Without words, the strict form stands for them.
    base = {"specificity_strict": 1.0}
    strict = PERFECT | {f"{name}_strict": 0.5 for name in PERFECT}
    assert score_of(base, strict, 0.05).value == pytest.approx(0.75)
    assert score_of(base, strict | after, 0.05).value == pytest.approx(0.75)
    assert score_of(base, strict | PERFECT | {"efficacy_said": 0.0}, 0.05).value == 0.5
    # What was not measured does not count, and nothing measured is no success.
    assert score_of({}, PERFECT | {"efficacy_said": None}, 0.05).value == 1.0
    assert score_of({}, PERFECT | {"efficacy": 0.0}, 0.05).value == 0.0
    assert score_of({}, {}, 0.05).value == 0.0


def test_answers_in_chat_count_where_they_are_asked_for() -> None:
    said = dict.fromkeys(("efficacy_said", "generalization_said", "locality"), 1.0)
    after = PERFECT | said | {"chat_said": 0.0}
    assert score_of({}, after, 0.05).value == 1.0
    assert score_of({}, after, 0.05, chat=True).value == 0.5


def test_what_a_model_never_said_is_no_loss() -> None:
    strict = PERFECT | {f"{name}_strict": 1.0 for name in PERFECT}

    def score(before: float, after: float) -> float:
        changed = strict | {"specificity_strict": after}
        return score_of({"specificity_strict": before}, changed, 0.05).value

    # What is left of what it said before.
    assert score(0.8, 0.4) == pytest.approx((1 + 3 / (1 + 1 + 2)) / 2)
    assert score(0.5, 0.6) == 1.0
    # A model that says one neighbor in ten right says as little afterwards.
    assert score(0.1, 0.0) == 1.0
    assert score(0.2, 0.0) == 0.5


def test_perplexity_may_rise_by_as_much_as_is_allowed() -> None:
    for after, excess in ((9.0, 0.0), (10.4, 0.0), (10.6, 0.01), (12.0, 0.15)):
        score = score_of({"perplexity": 10.0}, PERFECT | {"perplexity": after}, 0.05)
        assert score.excess == pytest.approx(excess)
        assert score.allowed == (not excess)
    assert score_of({"perplexity": None}, PERFECT, 0.05).allowed


def test_the_interval_of_a_difference_shrinks_with_the_number_of_facts() -> None:
    def rows(good: int, of: int) -> list[dict[str, float]]:
        return [{f"after_{name}": float(i < good) for name in PERFECT} for i in range(of)]

    few, many = (difference(rows(3 * n, 4 * n), rows(n, 4 * n)) for n in (4, 40))
    assert few[0] < 0.5 < few[1]
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert difference(rows(3, 4), rows(3, 4)) == (0.0, 0.0)
