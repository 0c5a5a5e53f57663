"""Measuring a model: requests and held-out texts, in parts that workers share.

Requests with prompts in common are measured together, so that each prompt is read once: neighbors
of one answer are asked about in many requests. What is measured together follows from the job
alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.digest import digest_of
from pipeline.evaluation import How
from pipeline.executor import Task
from pipeline.measurement_store import FORMAT, MeasurementStore, request_key, texts_key
from pipeline.plan import Plan
from pipeline.replica import Measured, ModelSource
from pipeline.stages import Context, sampled
from pmet.metrics import TextScore
from pmet.request import EditRequest
from pmet.texts import add_consistency

LARGEST_PART = 96
TEXTS_TOGETHER = 32
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Measurement:
    """What a model was found to say.

    Attributes:
        rows: figures, greedy answer and written text by input row, for the measured requests.
        texts: scores of held-out texts; empty without a corpus.
    """

    rows: dict[int, dict[str, Any]]
    texts: list[TextScore]

    @property
    def perplexity(self) -> float | None:
        """On the held-out texts; None without any, or where it is no number."""
        count = sum(len(text.greedy) for text in self.texts)
        mean = math.fsum(text.nll for text in self.texts) / count if count else math.nan
        # A ruined model's mean may be NaN, or too large for exp.
        return math.exp(mean) if mean < _LARGEST_EXPONENT else None

    def agreed(self, other: Measurement) -> tuple[list[int], list[int]]:
        """By held-out text, at how many places two models have the same likeliest token, and at how
        many they were asked.
        """
        agreed = [text.agreed(theirs) for text, theirs in zip(self.texts, other.texts, strict=True)]
        return agreed, [len(text.greedy) for text in self.texts]


def measure(run: Context, name: str, source: ModelSource) -> Measurement:
    """Score the sampled requests on a model, and held-out texts where there is a corpus."""
    plan = run.plan
    how, asked = How.of(plan.job.evaluate, plan.job.seed), _asked(plan)
    record = run.folder.recorded(f"measured-{name}")
    if record is not None and record.get("asked") == asked:
        texts = [TextScore(**text) for text in record["texts"]]
        return Measurement({int(r): v for r, v in record["rows"].items()}, texts)
    table, chosen = plan.table, sampled(plan)
    # The base says the same every time.
    kept = MeasurementStore.of(plan) if source == plan.base else None
    keys = {} if kept is None else {i: request_key(table.requests[i], how) for i in chosen}
    of_texts = texts_key(plan)
    said = {} if kept is None else kept.read({*keys.values(), of_texts})
    rows = {table.rows[i]: said[keys[i]] for i in keys if keys[i] in said}
    todo = [i for i in chosen if table.rows[i] not in rows]
    with run.stage(f"measure {name}", len(chosen)) as (bar, detail):
        if kept is not None:
            detail["stored"] = len(rows)
        bar.advance(len(rows))
        _measure_requests(run, name, (source, how), todo, rows, bar.advance)
        stored = said.get(of_texts)
        if stored is None:
            texts = _score_texts(run, name, source)
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
    """Digest of what a job wants measured; where it has changed, what was measured is stale."""
    evaluate = plan.job.evaluate.model_dump(include={"sample", "perplexity_texts"})
    how = How.of(plan.job.evaluate, plan.job.seed)
    return digest_of([FORMAT, evaluate, asdict(how)])


def _measure_requests(
    run: Context,
    name: str,
    model: tuple[ModelSource, How],
    places: Sequence[int],
    rows: dict[int, dict[str, Any]],
    on_progress: Callable[[int], None],
) -> None:
    table = run.plan.table
    parts = {f"measure {name} {i}": part for i, part in enumerate(parts_of(table.requests, places))}

    def take(task: Task, measured: Measured) -> None:
        part = parts[task.key]
        for i, figures, answer in zip(part, measured.rows, measured.answers, strict=True):
            rows[table.rows[i]] = {**figures, "answer": answer}
        on_progress(len(part))

    tasks = [Task(k, (*model, [table.requests[i] for i in part])) for k, part in parts.items()]
    run.crew.map("measure", tasks, take)


def parts_of(requests: Sequence[EditRequest], places: Sequence[int]) -> list[list[int]]:
    """Places in parts of about one size, those whose prompts may be the same together.

    The number of parts is a power of two, which most numbers of workers share out well.
    """
    if not places:
        return []
    alike = np.array([_likeness(requests[i]) for i in places], np.uint64)
    order = np.argsort(alike, kind="stable").tolist()
    number = 1
    while number * LARGEST_PART < len(places):
        number *= 2
    edges = [len(places) * i // number for i in range(number + 1)]
    return [[places[i] for i in order[start:stop]] for start, stop in pairwise(edges)]


def _likeness(request: EditRequest) -> int:
    """A number that is the same for requests with one answer so far and one prompt."""
    text = f"{request.target_true} {request.prompt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _score_texts(run: Context, name: str, source: ModelSource) -> list[TextScore]:
    if run.plan.corpus is None:
        return []
    sample = held_out(run.plan.corpus.texts, run.plan.job.evaluate.perplexity_texts)
    parts = {
        f"texts {name} {i}": sample[i : i + TEXTS_TOGETHER]
        for i in range(0, len(sample), TEXTS_TOGETHER)
    }
    found: dict[str, list[TextScore]] = {}
    tasks = [Task(key, (source, texts)) for key, texts in parts.items()]
    run.crew.map("score_texts", tasks, lambda task, scores: found.update({task.key: scores}))
    return [score for key in parts for score in found[key]]


def held_out(texts: Sequence[str], count: int) -> list[str]:
    """``count`` texts from the whole length of a corpus, or all it has."""
    return list(texts[:: max(1, len(texts) // count)][:count])
