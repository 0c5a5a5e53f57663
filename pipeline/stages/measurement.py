"""Measuring a model: requests, unrelated prompts and held-out texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.data import Place, Row
from pipeline.evaluation import How
from pipeline.events import StageName
from pipeline.models import ModelSource
from pipeline.plan import Plan
from pipeline.stages.asking import Asking
from pipeline.stages.context import Context, sampled
from pipeline.stages.measurement_store import FORMAT, MeasurementStore, model_key, request_key
from pipeline.stages.measurement_work import (
    MeasurementMeter,
    answering,
    tokens_read,
    work_of_texts,
)
from pipeline.storage import digest_of
from pmet.evaluation import (
    Prompts,
    Questions,
    Said,
    TextScore,
    add_consistency,
    add_locality,
    ask_questions,
    evaluate,
    questions_of,
    said_text,
    same,
    score_texts,
    total,
    unrelated_prompts,
)
from pmet.request import EditRequest

_LARGEST_EXPONENT = 700.0

_STAGES = {"before": StageName.MEASURE_BEFORE, "after": StageName.MEASURE_AFTER}


@dataclass(frozen=True)
class Measurement:
    """The measurements of a model.

    Attributes:
        rows: figures, answers and generated text by input row, for the measured requests.
        texts: scores of held-out texts; empty without a corpus.
        unrelated: answers to unrelated prompts, by prompt; empty if they were not asked.
    """

    rows: dict[Row, dict[str, Any]]
    texts: list[TextScore]
    unrelated: dict[str, Said | None] = field(default_factory=dict)

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

    def kept(self, base: Measurement) -> list[bool]:
        """For each unrelated prompt, whether the answer is the base model's."""
        return [
            same(said_text(said), said_text(base.unrelated[prompt]))
            for prompt, said in self.unrelated.items()
            if prompt in base.unrelated
        ]

    def as_json(self) -> dict[str, Any]:
        """The measurement as JSON values; `from_json` reads it back."""
        texts = [asdict(text) for text in self.texts]
        return {"rows": self.rows, "texts": texts, "unrelated": self.unrelated}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measurement:
        """Read a measurement."""
        rows = {Row(int(row)): dict(figures) for row, figures in values["rows"].items()}
        for figures in rows.values():
            if "neighbors" in figures:
                figures["neighbors"] = [said and Said(*said) for said in figures["neighbors"]]
        return cls(
            rows,
            [TextScore(**text) for text in values["texts"]],
            {text: said and Said(*said) for text, said in values["unrelated"].items()},
        )


def measure(
    run: Context, name: str, source: ModelSource, base: Measurement | None = None
) -> Measurement:
    """Measure a model on the sampled requests, and on held-out texts if there is a corpus.

    Args:
        run: the run.
        name: ``before`` or ``after``.
        source: the model.
        base: the base model's measurement, to compare an edited model's answers with.
    """
    plan = run.plan
    how, asked = How.of(plan.job.evaluate, plan.job.seed), _asked(plan)
    record = run.folder.recorded(f"measured-{name}")
    if record is not None and record.get("asked") == asked:
        return Measurement.from_json(record)
    chosen, held = _Chosen.of(plan), held_out_of(plan)
    answered = chosen.answered(work_of_texts(held))
    rows_at = plan.table.rows
    # The base model gives the same answers every time.
    kept = MeasurementStore.of(plan) if source == plan.base else None
    keys = {
        place: request_key(chosen[place], how, answered=place in answered)
        for place in (chosen.places if kept is not None else ())
    }
    of_model = model_key(plan)
    stored = {} if kept is None else kept.read({*keys.values(), of_model})
    rows = {rows_at[i]: stored[keys[i]] for i in keys if keys[i] in stored}
    todo = [i for i in chosen.places if rows_at[i] not in rows]
    whole = stored.get(of_model)
    with run.stage(_STAGES[name]) as (bar, detail):
        if kept is not None:
            detail["stored"] = len(rows)
        meter = MeasurementMeter(bar, len(todo), held if whole is None else [])
        rows_before, unrelated = (base.rows, base.unrelated) if base else ({}, {})
        also = unrelated if whole is None and answered else None
        ask = Asking(run, name, source, how, meter, rows_before, also)
        for place, figures in ask.requests(todo, chosen.__getitem__, answered):
            rows[rows_at[place]] = figures
        if whole is None:
            whole = {
                "unrelated": ask.answers_to_unrelated(),
                "texts": [asdict(text) for text in ask.texts(held)],
            }
    if kept is not None:
        kept.write({keys[i]: rows[rows_at[i]] for i in todo} | {of_model: whole})
    if how.writing_seed is not None:
        references = {rows_at[i]: chosen[i].reference_texts for i in chosen.places}
        add_consistency((rows[row], references[row]) for row in sorted(rows))
    measured = Measurement.from_json({"rows": rows, **whole})
    if base is not None:
        for row, figures in measured.rows.items():
            add_locality(figures, base.rows[row])
    run.folder.record(f"measured-{name}", measured.as_json() | {"asked": asked})
    return measured


@dataclass(frozen=True)
class AskingHere:
    """Measures models in this process.

    Attributes:
        requests: the requests.
        rows: their rows.
        answered: numbers of those to answer in the model's own words.
        texts: held-out texts.
        how: how requests are measured.
        meter: counts the work.
    """

    requests: Sequence[EditRequest]
    rows: Sequence[Row]
    answered: frozenset[int]
    texts: Sequence[str]
    how: How
    meter: MeasurementMeter

    def base(self, model: Any, tokenizer: Any) -> Measurement:
        """Of a base model, only what the other one is compared with."""
        own = questions_of(self.requests[i] for i in sorted(self.answered))
        said = self._kept(model, tokenizer, own.kept)
        by_row: dict[Row, dict[str, Any]] = {row: {} for row in self.rows}
        for i in self.answered:
            neighbors = self.requests[i].neighborhood_prompts
            by_row[self.rows[i]]["neighbors"] = [said[prompt] for prompt in neighbors]
        return Measurement(by_row, self._scores(model, tokenizer), _unrelated(said))

    def model(self, model: Any, tokenizer: Any, base: Measurement | None) -> Measurement:
        """Everything about a model."""
        writing = self.how.writing_seed is not None
        found = evaluate(
            model,
            tokenizer,
            self.requests,
            answers=self.answered,
            base=None if base is None else [base.rows[row] for row in self.rows],
            fluency=writing,
            chat_template=self.how.chat_template,
            seed=self.how.writing_seed or 0,
            on_progress=self.meter.continuations(
                self.requests,
                writing=writing,
                answering=[self.requests[i] for i in sorted(self.answered)],
            ),
        )
        said = {} if base is None else self._kept(model, tokenizer, ())
        self.meter.complete()
        by_row = dict(zip(self.rows, found["rows"], strict=True))
        return Measurement(by_row, self._scores(model, tokenizer), _unrelated(said))

    def _kept(self, model: Any, tokenizer: Any, neighbors: Sequence[str]) -> dict[str, Said | None]:
        """Answers to neighborhood prompts and unrelated ones."""
        if not self.answered:
            return {}
        kept = Questions(kept=(*dict.fromkeys((*neighbors, *unrelated_prompts())),))
        return ask_questions(model, Prompts(tokenizer, self.how.chat_template), kept).kept

    def _scores(self, model: Any, tokenizer: Any) -> list[TextScore]:
        return score_texts(model, tokenizer, self.texts, on_progress=self.meter.scored)


def _unrelated(said: Mapping[str, Said | None]) -> dict[str, Said | None]:
    return {prompt: said[prompt] for prompt in unrelated_prompts() if prompt in said}


def _asked(plan: Plan) -> str:
    """Digest of everything a job wants measured; if it changes, old measurements are stale."""
    keys = {"sample", "perplexity_texts", "perplexity_tokens", "answers"}
    evaluate = plan.job.evaluate.model_dump(include=keys)
    how = How.of(plan.job.evaluate, plan.job.seed)
    return digest_of([FORMAT, evaluate, asdict(how), dict(plan.questions.templates)])


@dataclass(frozen=True)
class _Chosen:
    """The requests to measure, which are read when they are needed.

    Attributes:
        plan: the plan.
        places: their places.
    """

    plan: Plan
    places: list[Place]

    @classmethod
    def of(cls, plan: Plan) -> _Chosen:
        return cls(plan, sampled(plan))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Place) -> EditRequest:
        table = self.plan.table
        return self.plan.questions.to_ask(table.requests[place], table.rows[place], table.table)

    def answered(self, texts: int) -> frozenset[Place]:
        """The places of those to answer in the model's own words, if texts are so much work."""
        evaluate, seed = self.plan.job.evaluate, self.plan.job.seed
        numbers = answering(
            len(self), lambda i: self[self.places[i]], evaluate.answers, texts, seed
        )
        return frozenset(self.places[number] for number in numbers)


def held_out_of(plan: Plan) -> list[str]:
    """The texts that perplexity and agreement are measured on; none without a corpus."""
    if plan.corpus is None:
        return []
    evaluate = plan.job.evaluate
    return held_out(plan.corpus.texts, evaluate.perplexity_texts, evaluate.perplexity_tokens)


def held_out(texts: Sequence[str], count: int, tokens: int) -> list[str]:
    """``count`` texts spread evenly over a corpus, or as many as have about ``tokens`` tokens."""
    sample = _spread(texts, count)
    counted = [tokens_read(text) for text in sample]
    if sum(counted) > tokens:
        sample = _spread(texts, max(1, len(counted) * tokens // sum(counted)))
    return sample


def _spread(texts: Sequence[str], count: int) -> list[str]:
    return list(texts[:: max(1, len(texts) // count)][:count])
