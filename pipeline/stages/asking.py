"""The questions of requests to a model, in parts that workers share, and their answers combined.

Workers share prompts, not requests: many requests have the same neighbors with the same answer,
which are read only once. What is measured together depends only on the job.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from pipeline.cluster import Task
from pipeline.data import Place, Row
from pipeline.evaluation import How
from pipeline.models import ModelSource
from pipeline.stages.context import Context
from pipeline.stages.measurement_work import MeasurementMeter, tokens_read, work_of_part
from pipeline.workers import Asked, Measured
from pmet.evaluation import (
    Answered,
    Continuation,
    Questions,
    Said,
    Score,
    TextScore,
    add_said,
    add_texts,
    beginnings,
    continuations_of,
    drafts_of,
    figures_of,
    questions_of,
    unrelated_prompts,
)
from pmet.request import EditRequest

LARGEST_PART, LARGEST_WORK = 512, 8192
"""Prompts sent to a worker together, and their work in estimated tokens."""
_FEW_PARTS, _LEAST_WORK = 4, 2048
"""Up to this many parts, so that most workers get one, each with at least this work."""
BLOCK = 8192
"""Requests in memory at a time."""
TEXTS_TOGETHER = 32
"""Held-out texts sent to a worker together, at most."""

_Item = TypeVar("_Item")
_Numbered = tuple[int, EditRequest]


@dataclass(frozen=True)
class Asking:
    """Asks one model.

    Attributes:
        run: the run.
        name: ``before`` or ``after``.
        source: the model.
        how: how it is measured.
        meter: counts the work.
        base: the base model's rows, whose answers the model may give as well; none without one.
        unrelated: the base model's answers to unrelated prompts, which the model may give as well;
            None: it is not asked them.
    """

    run: Context
    name: str
    source: ModelSource
    how: How
    meter: MeasurementMeter
    base: Mapping[Row, Mapping[str, Any]] = field(default_factory=dict)
    unrelated: Mapping[str, Said | None] | None = None
    _kept: dict[str, Said | None] = field(default_factory=dict, init=False)

    def requests(
        self,
        places: Sequence[Place],
        request_at: Callable[[Place], EditRequest],
        answered: frozenset[Place],
    ) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Yield the place of each request, with its figures and the model's answers.

        Unrelated prompts are asked with the first of them: a step of generation takes nearly as
        long with few rows as with many.

        Args:
            places: the places of the requests.
            request_at: returns the request at a place.
            answered: places of those that the model answers in its own words.
        """
        for start in range(0, len(places), BLOCK):
            block = places[start : start + BLOCK]
            requests = [request_at(place) for place in block]
            in_own_words = [r for p, r in zip(block, requests, strict=True) if p in answered]
            rows = [self.base.get(self.run.plan.table.rows[place], {}) for place in block]
            also = () if self.unrelated is None or start else unrelated_prompts()
            parts = parts_of(
                requests,
                writing=self.how.writing_seed is not None,
                answering=in_own_words,
                also=also,
                drafts=drafts_of(requests, rows) | _drafts(self.unrelated),
            )
            answers = Answers(parts)
            tasks = [
                Task(f"measure {self.name} {start} {number}", (self.source, self.how, part))
                for number, part in enumerate(answers.parts)
            ]
            numbers = {task.key: i for i, task in enumerate(tasks)}
            taking = _Taking(answers, numbers, len(block), self.meter)
            self.meter.block(len(block), sum(map(work_of_part, answers.parts)))
            self.run.executor.map("measure", tasks, taking)
            self._kept.update((prompt, answers.kept[prompt]) for prompt in also)
            yield from zip(block, answers.rows(requests, in_own_words), strict=True)

    def answers_to_unrelated(self) -> dict[str, Said | None]:
        """The model's answers to unrelated prompts; asks them now if no request was asked."""
        if self.unrelated is not None and not self._kept:
            whole = Questions(kept=unrelated_prompts())
            part = Asked([], questions=whole, drafts=_drafts(self.unrelated))
            task = Task(f"unrelated {self.name}", (self.source, self.how, part))

            def take(_task: Task, measured: Measured) -> None:
                self._kept.update(measured.answered.kept)

            self.run.executor.map("measure", [task], take)
        # In the order of the prompts, whichever came first.
        return {text: self._kept[text] for text in unrelated_prompts() if text in self._kept}

    def texts(self, sample: Sequence[str]) -> list[TextScore]:
        """The model's scores of held-out texts."""
        parts = {f"texts {self.name} {i}": part for i, part in enumerate(parts_of_texts(sample))}
        found: dict[int, TextScore] = {}

        def take(task: Task, scores: list[TextScore]) -> None:
            numbers = parts[task.key]
            found.update(zip(numbers, scores, strict=True))
            self.meter.scored([sample[number] for number in numbers])

        tasks = [
            Task(key, (self.source, [sample[number] for number in numbers]))
            for key, numbers in parts.items()
        ]
        if tasks:
            self.run.executor.map("score_texts", tasks, take)
        return [found[number] for number in range(len(sample))]


class _Taking:
    """Collects the answers to tasks, and reports progress as a share of the requests."""

    def __init__(
        self,
        answers: Answers,
        numbers: Mapping[str, int],
        requests: int,
        meter: MeasurementMeter,
    ) -> None:
        self._answers, self._numbers, self._requests = answers, numbers, requests
        self._meter, self._reported = meter, 0

    def __call__(self, task: Task, measured: Measured) -> None:
        number = self._numbers[task.key]
        self._answers.take(number, measured)
        # A request's prompts may be in several parts.
        done = self._requests * self._answers.taken // len(self._answers.parts)
        self._meter.asked(done - self._reported, work_of_part(self._answers.parts[number]))
        self._reported = done


class Answers:
    """A model's answers to the parts of an evaluation, combined.

    Args:
        parts: the questions of each part.

    Attributes:
        parts: the same.
        taken: how many of them have been answered.
    """

    def __init__(self, parts: Sequence[Asked]) -> None:
        self.parts, self.taken = parts, 0
        self._scored: dict[Continuation, Score] = {}
        self._written: dict[str, str] = {}
        self._answered = Answered()

    @property
    def kept(self) -> Mapping[str, Said | None]:
        """The answers to prompts that an edit should leave alone."""
        return self._answered.kept

    def take(self, number: int, measured: Measured) -> None:
        """Add the answers to a part."""
        part = self.parts[number]
        self.taken += 1
        for pairs, scores in zip(part.prompts, measured.scores, strict=True):
            self._scored |= zip(pairs, scores, strict=True)
        self._written |= zip(part.written, measured.texts, strict=True)
        self._answered.add(measured.answered)

    def figures(self, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
        """The figures of each request that are fractions of its prompts."""
        return [figures_of(request, self._scored) for request in requests]

    def rows(
        self, requests: Sequence[EditRequest], answering: Sequence[EditRequest] = ()
    ) -> list[dict[str, Any]]:
        """The figures, answers and generated text of each request.

        Args:
            requests: the requests.
            answering: those of them, the same objects, that were answered in the model's own words.
        """
        rows = self.figures(requests)
        by_request = {id(request): row for request, row in zip(requests, rows, strict=True)}
        add_said([by_request[id(request)] for request in answering], answering, self._answered)
        if self._written:
            add_texts(rows, requests, self._written)
        return rows


def parts_of(
    requests: Sequence[EditRequest],
    *,
    writing: bool = False,
    answering: Iterable[EditRequest] = (),
    also: Iterable[str] = (),
    drafts: Mapping[str, Said] | None = None,
) -> list[Asked]:
    """Split the questions of requests into parts of similar size; shared questions occur once.

    Prompts that begin alike are in one part. The number of parts is a power of two, which divides
    evenly among most numbers of workers.

    Args:
        requests: the requests.
        writing: whether to generate text.
        answering: requests to answer in the model's own words.
        also: further prompts that an edit should leave alone, to answer as well.
        drafts: answers that the model may give, by prompt.
    """
    pairs: dict[str, dict[Continuation, None]] = defaultdict(dict)
    for request in requests:
        for pair in continuations_of(request):
            pairs[pair[0]][pair] = None
    prompts = [list(pairs[prompt]) for prompt in sorted(pairs)]
    written = sorted({text for r in requests for text in beginnings(r)}) if writing else []
    asked = questions_of(answering)
    own = [sorted(texts) for texts in (asked.stated, asked.chat, {*asked.kept, *also})]
    whole = Asked(prompts, written, Questions(*own))
    number = 1
    work = work_of_part(whole)
    while (
        number * LARGEST_PART < len(prompts)
        or number * LARGEST_WORK < work
        or (number < _FEW_PARTS and number * _LEAST_WORK < work)
    ):
        number *= 2
    cut = zip(
        _cut(prompts, number), _cut(written, number), *(_cut(o, number) for o in own), strict=True
    )
    return [
        Asked(prompts, written, Questions(stated, chat, kept), _of(kept, drafts or {}))
        for prompts, written, stated, chat, kept in cut
    ]


def parts_of_texts(texts: Sequence[str]) -> list[list[int]]:
    """Split texts into parts of similar work: the numbers of the texts in each.

    A part less than others have, with texts of any length, would leave a worker idle.
    """
    number = min(_FEW_PARTS, len(texts))
    while number * TEXTS_TOGETHER < len(texts):
        number *= 2
    longest_first = sorted(range(len(texts)), key=lambda i: tokens_read(texts[i]), reverse=True)
    return [longest_first[i::number] for i in range(number)]


def _drafts(answers: Mapping[str, Said | None] | None) -> dict[str, Said]:
    return {text: said for text, said in (answers or {}).items() if said is not None}


def _of(texts: Iterable[str], drafts: Mapping[str, Said]) -> dict[str, Said]:
    return {text: drafts[text] for text in texts if text in drafts}


def _cut(items: list[_Item], number: int) -> list[list[_Item]]:
    """Split items into ``number`` runs of similar length."""
    edges = [len(items) * i // number for i in range(number + 1)]
    return [items[start:stop] for start, stop in pairwise(edges)]
