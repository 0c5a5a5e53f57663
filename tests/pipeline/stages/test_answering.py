"""How many requests a model answers in its own words."""

from __future__ import annotations

from pipeline.stages.answering import FEWEST, answering
from pipeline.stages.measurement_work import work_of_answers, work_of_scores
from pmet.request import EditRequest

MANY = 5000


def request_at(number: int) -> EditRequest:
    return EditRequest("{} is in", f"Place {number:04}", "Rome", target_true="Lyon")


def test_few_requests_are_all_answered() -> None:
    assert answering(FEWEST, request_at, "auto", 0, 0) == set(range(FEWEST))
    assert answering(0, request_at, "auto", 0, 0) == set()


def test_of_many_as_many_as_cost_no_more_than_the_rest() -> None:
    numbers = answering(MANY, request_at, "auto", 0, 0)
    assert FEWEST < len(numbers) < MANY
    scores = work_of_scores([request_at(i) for i in range(MANY)])
    assert 0.95 < work_of_answers([request_at(i) for i in numbers]) / scores <= 1
    # Held-out texts are part of the rest.
    more = answering(MANY, request_at, "auto", scores, 0)
    assert len(more) > 1.9 * len(numbers)


def test_a_number_is_a_number_and_the_seed_decides_which() -> None:
    assert answering(MANY, request_at, 0, 10**9, 0) == set()
    seven = answering(MANY, request_at, 7, 10**9, 0)
    assert len(seven) == 7
    assert answering(MANY, request_at, 7, 0, 0) == seven
    assert answering(MANY, request_at, 7, 0, 1) != seven
    assert answering(3, request_at, 7, 0, 0) == {0, 1, 2}
