"""Measuring a model: requests and held-out texts, in parts that workers share.

Workers share prompts, not requests: many requests have the same neighbors with the same answer,
which are read only once. What is measured together depends only on the job.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

from pipeline.cluster import Task
from pipeline.data import Place, Row
from pipeline.evaluation import How
from pipeline.events import StageName
from pipeline.models import ModelSource
from pipeline.plan import Plan
from pipeline.stages.context import Context, sampled
from pipeline.stages.measurement_store import FORMAT, MeasurementStore, request_key, texts_key
from pipeline.stages.measurement_work import MeasurementMeter, work_of_part
from pipeline.storage import digest_of
from pipeline.workers import Asked, Measured
from pmet.evaluation import (
    Continuation,
    Score,
    TextScore,
    add_consistency,
    add_texts,
    beginnings,
    continuations_of,
    figures_of,
    total,
)
from pmet.request import EditRequest

LARGEST_PART = 512
"""Prompts sent to a worker together."""
BLOCK = 8192
"""Requests in memory at a time."""
TEXTS_TOGETHER = 32
_LARGEST_EXPONENT = 700.0

_Item = TypeVar("_Item")

_STAGES = {"before": StageName.MEASURE_BEFORE, "after": StageName.MEASURE_AFTER}


@dataclass(frozen=True)
class Measurement:
    """The measurements of a model.

    Attributes:
        rows: figures, greedy answer and generated text by input row, for the measured requests.
        texts: scores of held-out texts; empty without a corpus.
    """

    rows: dict[Row, dict[str, Any]]
    texts: list[TextScore]

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the held-out texts; None without any. A ruined model's may be NaN or ∞."""
        count = sum(len(text.greedy) for text in self.texts)
        if not count:
            return None
        mean = total([text.nll for text in self.texts]) / count
        return math.inf if mean >= _LARGEST_EXPONENT else math.exp(mean)

    def agreed(self, other: Measurement) -> tuple[list[int], list[int]]:
        """For each held-out text, the number of positions at which two models have the same most
        likely token, and the number of positions compared.
        """
        agreed = [text.agreed(theirs) for text, theirs in zip(self.texts, other.texts, strict=True)]
        return agreed, [len(text.greedy) for text in self.texts]


def measure(run: Context, name: str, source: ModelSource) -> Measurement:
    """Measure a model on the sampled requests, and on held-out texts if there is a corpus."""
    plan = run.plan
    how, asked = How.of(plan.job.evaluate, plan.job.seed), _asked(plan)
    record = run.folder.recorded(f"measured-{name}")
    if record is not None and record.get("asked") == asked:
        texts = [TextScore(**text) for text in record["texts"]]
        return Measurement({Row(int(r)): v for r, v in record["rows"].items()}, texts)
    table, chosen = plan.table, sampled(plan)
    # The base model gives the same answers every time.
    kept = MeasurementStore.of(plan) if source == plan.base else None
    keys = {} if kept is None else {i: request_key(table.requests[i], how) for i in chosen}
    of_texts = texts_key(plan)
    said = {} if kept is None else kept.read({*keys.values(), of_texts})
    rows = {table.rows[i]: said[keys[i]] for i in keys if keys[i] in said}
    todo = [i for i in chosen if table.rows[i] not in rows]
    stored = said.get(of_texts)
    held = _held_out(plan) if stored is None else []
    with run.stage(_STAGES[name]) as (bar, detail):
        if kept is not None:
            detail["stored"] = len(rows)
        meter = MeasurementMeter(bar, len(todo), held)
        for i, figures in _measure_requests(run, name, (source, how), todo, meter):
            rows[table.rows[i]] = figures
        if stored is None:
            texts = _score_texts(run, name, source, held, meter)
        else:
            texts = [TextScore(**text) for text in stored]
    if kept is not None:
        new = {keys[i]: rows[table.rows[i]] for i in todo}
        kept.write(new if stored else new | {of_texts: [asdict(text) for text in texts]})
    if how.writing_seed is not None:
        places = dict(zip(table.rows, range(len(table.rows)), strict=True))
        add_consistency((rows[r], table.requests[places[r]].reference_texts) for r in sorted(rows))
    value = {"rows": rows, "texts": [asdict(text) for text in texts], "asked": asked}
    run.folder.record(f"measured-{name}", value)
    return Measurement(rows, texts)


def _asked(plan: Plan) -> str:
    """Digest of everything a job wants measured; if it changes, old measurements are stale."""
    evaluate = plan.job.evaluate.model_dump(include={"sample", "perplexity_texts"})
    how = How.of(plan.job.evaluate, plan.job.seed)
    return digest_of([FORMAT, evaluate, asdict(how)])


def _measure_requests(
    run: Context,
    name: str,
    model: tuple[ModelSource, How],
    places: Sequence[Place],
    meter: MeasurementMeter,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the place of each request, with its figures and the model's answers."""
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        requests = [run.plan.table.requests[i] for i in block]
        answers = Answers(parts_of(requests, writing=model[1].writing_seed is not None))
        tasks = [
            Task(f"measure {name} {start} {number}", (*model, part))
            for number, part in enumerate(answers.parts)
        ]
        numbers = {task.key: i for i, task in enumerate(tasks)}
        taking = _Taking(answers, numbers, len(block), meter)
        meter.block(len(block), sum(map(work_of_part, answers.parts)))
        run.executor.map("measure", tasks, taking)
        yield from zip(block, answers.rows(requests), strict=True)


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
        self._said: dict[str, str] = {}
        self._written: dict[str, str] = {}

    def take(self, number: int, measured: Measured) -> None:
        """Add the answers to a part."""
        part = self.parts[number]
        self.taken += 1
        for pairs, scores in zip(part.prompts, measured.scores, strict=True):
            self._scored |= zip(pairs, scores, strict=True)
        self._said |= zip(part.answered, measured.answers, strict=True)
        self._written |= zip(part.written, measured.texts, strict=True)

    def figures(self, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
        """The figures of each request that are fractions of its prompts."""
        return [figures_of(request, self._scored) for request in requests]

    def rows(self, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
        """The figures, greedy answer and generated text of each request."""
        rows = self.figures(requests)
        for row, request in zip(rows, requests, strict=True):
            row["answer"] = self._said[request.text]
        if self._written:
            add_texts(rows, requests, self._written)
        return rows


def parts_of(requests: Sequence[EditRequest], *, writing: bool = False) -> list[Asked]:
    """Split the questions of requests into parts of similar size; shared questions occur once.

    Prompts that begin alike are in one part. The number of parts is a power of two, which divides
    evenly among most numbers of workers.

    Args:
        requests: the requests.
        writing: whether to generate text.
    """
    pairs: dict[str, dict[Continuation, None]] = defaultdict(dict)
    for request in requests:
        for pair in continuations_of(request):
            pairs[pair[0]][pair] = None
    prompts = [list(pairs[prompt]) for prompt in sorted(pairs)]
    answered = sorted({request.text for request in requests})
    written = sorted({text for r in requests for text in beginnings(r)}) if writing else []
    number = 1
    while number * LARGEST_PART < len(prompts):
        number *= 2
    cut = (_cut(list_, number) for list_ in (prompts, answered, written))
    return [Asked(*part) for part in zip(*cut, strict=True)]


def _cut(items: list[_Item], number: int) -> list[list[_Item]]:
    """Split items into ``number`` runs of similar length."""
    edges = [len(items) * i // number for i in range(number + 1)]
    return [items[start:stop] for start, stop in pairwise(edges)]


def _held_out(plan: Plan) -> list[str]:
    if plan.corpus is None:
        return []
    return held_out(plan.corpus.texts, plan.job.evaluate.perplexity_texts)


def _score_texts(
    run: Context, name: str, source: ModelSource, sample: Sequence[str], meter: MeasurementMeter
) -> list[TextScore]:
    parts = {
        f"texts {name} {i}": sample[i : i + TEXTS_TOGETHER]
        for i in range(0, len(sample), TEXTS_TOGETHER)
    }
    found: dict[str, list[TextScore]] = {}

    def take(task: Task, scores: list[TextScore]) -> None:
        found[task.key] = scores
        meter.scored(parts[task.key])

    tasks = [Task(key, (source, texts)) for key, texts in parts.items()]
    if tasks:
        run.executor.map("score_texts", tasks, take)
    return [score for key in parts for score in found[key]]


def held_out(texts: Sequence[str], count: int) -> list[str]:
    """``count`` texts spread evenly over a corpus, or all it has."""
    return list(texts[:: max(1, len(texts) // count)][:count])
