"""The work of a measurement, in estimated tokens; its report is tested in `test_measurement`."""

from __future__ import annotations

from typing import Any

from pipeline.progress import Stage
from pipeline.stages.measurement_work import (
    FEWEST,
    MeasurementMeter,
    answering,
    work_of_answers,
    work_of_part,
    work_of_scores,
    work_of_texts,
)
from pipeline.workers.worker import Asked
from pmet.evaluation.metrics import evaluate, score_texts
from pmet.evaluation.said import Questions
from pmet.request import EditRequest
from tests.conftest import load_golden

MANY = 5000


class Counting(Stage):
    """Counts, and remembers the last total and note."""

    def __init__(self) -> None:
        self.done, self.all, self.last = 0, 0, ""

    def advance(self, count: int = 1) -> None:
        self.done += count

    def total(self, count: int) -> None:
        self.all = count

    def note(self, text: str) -> None:
        self.last = text


def test_a_longer_text_is_more_work() -> None:
    assert work_of_texts(["a" * 400, "b" * 40, "中" * 40]) == 101 + 11 + 31
    # Longer ones are not read to their end.
    assert work_of_texts(["a" * 10_000]) == 512


def test_a_prompt_is_read_once_for_all_its_targets() -> None:
    pairs: list[Any] = [("a" * 40, "b"), ("a" * 40, "c" * 8)]
    assert work_of_part(Asked([pairs])) == 11 + 1 + 3
    assert work_of_part(Asked([], ["a"])) == 100
    own = ["a" * 40]
    assert work_of_part(Asked([], questions=Questions(own, own, own))) == 3 * 11 + 18 + 42 + 6


def test_an_evaluation_at_once_is_counted_to_its_end() -> None:
    golden, bar = load_golden("gpt2"), Counting()
    requests: list[EditRequest] = golden.requests[:5]
    texts = ["Sur Bavov works as a baker.", "So", ""]
    meter = MeasurementMeter(bar, len(requests), texts)
    count = meter.continuations(requests, writing=True, answering=requests)
    evaluate(golden.model, golden.tokenizer, requests, on_progress=count)
    assert 0 < bar.done < bar.all - work_of_texts(texts)
    meter.complete()
    assert bar.done == bar.all - work_of_texts(texts)
    assert bar.last == "5 of 5 requests, 0 of 3 texts"
    score_texts(golden.model, golden.tokenizer, texts, on_progress=meter.scored)
    assert bar.done == bar.all
    assert bar.last == "5 of 5 requests, 3 of 3 texts"


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
