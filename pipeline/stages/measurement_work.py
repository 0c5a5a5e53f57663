"""How much work a measurement is, in tokens read or generated, for its progress.

Requests and texts take different times, so neither number says how far a measurement is; tokens
do. They are estimated from the length of the text, because counting them takes too long.

Generating an answer takes as long as reading many prompts. So, beyond a number of requests that
gives narrow intervals, no more are answered in the model's own words than take about as long as
everything else that is measured.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pipeline.progress import Stage
from pipeline.workers import Asked
from pmet.evaluation import (
    TEXT_TOKENS,
    WRITTEN_TOKENS,
    Continuation,
    Questions,
    beginnings,
    continuations_of,
    questions_of,
)
from pmet.request import EditRequest

SENTENCE, CLAUSE, CHAT = 18, 6, 24
"""Mean tokens of an answer to the end of a sentence, of a clause, and of a chat template, as
measured with SmolLM2-135M-Instruct and CounterFact's prompts."""
FEWEST = 200
"""Requests that are always asked, if there are as many."""
_COUNTED = 500
_BYTES_PER_TOKEN = 4  # of English; a Chinese character takes three


def tokens_in(text: str) -> int:
    """The estimated number of tokens of a text."""
    return 1 + len(text.encode()) // _BYTES_PER_TOKEN


def tokens_read(text: str) -> int:
    """Estimated tokens that are read of a held-out text."""
    return min(TEXT_TOKENS, tokens_in(text))


def work_of_texts(texts: Iterable[str]) -> int:
    """Estimated tokens that are read of held-out texts."""
    return sum(map(tokens_read, texts))


def work_of_prompts(prompts: Iterable[Sequence[Continuation]]) -> int:
    """Estimated tokens of prompts, each with its continuations."""
    return sum(
        tokens_in(pairs[0][0]) + sum(tokens_in(pair[1]) for pair in pairs) for pairs in prompts
    )


def work_of_questions(questions: Questions) -> int:
    """Estimated tokens of questions and of a model's answers in its own words."""
    return (
        sum(tokens_in(text) + SENTENCE for text in questions.stated)
        + sum(tokens_in(text) + CHAT + SENTENCE for text in questions.chat)
        + sum(tokens_in(text) + CLAUSE for text in questions.kept)
    )


def work_of_part(part: Asked) -> int:
    """Estimated tokens that a part of an evaluation reads and generates."""
    written = WRITTEN_TOKENS * len(part.written)
    return work_of_prompts(part.prompts) + work_of_questions(part.questions) + written


def work_of_scores(requests: Sequence[EditRequest]) -> int:
    """Estimated tokens of the scored prompts of requests."""
    pairs = {pair: None for request in requests for pair in continuations_of(request)}
    by_prompt = defaultdict(list)
    for pair in pairs:
        by_prompt[pair[0]].append(pair)
    return work_of_prompts(by_prompt.values())


def work_of_answers(requests: Sequence[EditRequest]) -> int:
    """Estimated tokens of the answers to the questions of requests."""
    return work_of_questions(questions_of(requests))


def answering(
    count: int,
    request_at: Callable[[int], EditRequest],
    wanted: int | Literal["auto"],
    texts: int,
    seed: int,
) -> frozenset[int]:
    """The numbers of the requests that a model answers in its own words.

    Args:
        count: how many requests are measured.
        request_at: returns the one with a number.
        wanted: how many to answer, or ``auto``.
        texts: work of the held-out texts, in estimated tokens.
        seed: seed of the draw.
    """
    if wanted != "auto":
        number = wanted
    elif count > FEWEST:
        number = max(FEWEST, _affordable(count, request_at, texts))
    else:
        number = count
    if number >= count:
        return frozenset(range(count))
    return frozenset(random.Random(seed).sample(range(count), number))


def _affordable(count: int, request_at: Callable[[int], EditRequest], texts: int) -> int:
    """The number of answered requests whose work is that of all other figures."""
    some = [request_at(i) for i in range(0, count, -(-count // _COUNTED))]
    answers, scores = (work(some) / len(some) for work in (work_of_answers, work_of_scores))
    return int((scores * count + texts) / answers)


class MeasurementMeter:
    """Reports the progress of a measurement: estimated tokens, and what they belong to.

    Args:
        bar: counts tokens.
        requests: the number of requests to measure.
        texts: the held-out texts to score.
    """

    def __init__(self, bar: Stage, requests: int, texts: Sequence[str]) -> None:
        self._bar, self._requests, self._texts = bar, requests, len(texts)
        self._asked = self._scored = self._done = self._started = self._expected = 0
        self._work_of_texts = work_of_texts(texts)
        if not requests:
            bar.total(self._work_of_texts)

    def block(self, requests: int, work: int) -> None:
        """Begin some of the requests; those after them are expected to take as long each."""
        self._started += requests
        self._expected = self._done + work
        later = work * (self._requests - self._started) // requests
        self._bar.total(self._done + work + later + self._work_of_texts)

    def asked(self, requests: int, work: int) -> None:
        """Count work on requests, and how many of them it completes."""
        self._asked += requests
        self._advance(work)

    def continuations(
        self,
        requests: Sequence[EditRequest],
        *,
        writing: bool,
        answering: Sequence[EditRequest] = (),
    ) -> Callable[[int], None]:
        """Begin all requests at once; return a function that counts scored continuations.

        Args:
            requests: the requests.
            writing: whether text is generated for them as well.
            answering: those to answer in the model's own words.
        """
        pairs = {pair for request in requests for pair in continuations_of(request)}
        work = sum(tokens_in(pair[0]) + tokens_in(pair[1]) for pair in pairs)
        written = {text for r in requests for text in beginnings(r)} if writing else ()
        answers = work_of_answers(answering)
        self.block(len(requests), work + answers + WRITTEN_TOKENS * len(written))
        scored = 0

        def count(number: int) -> None:
            nonlocal scored
            before, scored = scored, scored + number
            done, reported = (work * n // len(pairs) for n in (scored, before))
            self.asked(len(requests) * scored // len(pairs) - self._asked, done - reported)

        return count

    def complete(self) -> None:
        """Count what is left of the requests' work, such as generated text."""
        self._advance(self._expected - self._done)

    def scored(self, texts: Sequence[str]) -> None:
        """Count texts that have been scored."""
        self._scored += len(texts)
        self._advance(work_of_texts(texts))

    def _advance(self, work: int) -> None:
        self._done += work
        self._bar.advance(work)
        parts = ((self._asked, self._requests, "requests"), (self._scored, self._texts, "texts"))
        self._bar.note(", ".join(f"{done} of {all_} {what}" for done, all_, what in parts if all_))
