"""The scores of a truncated edit: the run's own measurement, once more, with B·A in place of Δ.

The run folder holds nearly everything: the requests and which of them were measured and answered
(``results.parquet``, ``records/``), the base model's answers, and the model. Only the corpus and
a file of questions are read from where the job names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data import Requests, Row
from pipeline.errors import RunFolderError, StorageError
from pipeline.evaluation import ChatQuestions, How
from pipeline.events import MEASURE
from pipeline.export.factors import FactoredWeight
from pipeline.job import JobConfig, load_job
from pipeline.models import ModelSource
from pipeline.progress import Progress
from pipeline.run_folder import MODEL, RunRecord
from pipeline.second_moments import read_again
from pipeline.stages import (
    AskingHere,
    Measurement,
    MeasurementMeter,
    figures_of,
    held_out,
    intervals_of,
)
from pmet.errors import InputError
from pmet.request import EditRequest
from pmet.update import longest

_BEFORE = "records/measured-before.json"


@dataclass(frozen=True)
class Scores:
    """Figures of a model.

    Attributes:
        figures: by name, as in ``metrics.json``.
        intervals: their 95 % intervals.
        device: where they were measured, and in which dtype.
    """

    figures: dict[str, float | None]
    intervals: dict[str, list[float]]
    device: str


def measure_again(run: RunRecord, weights: Sequence[FactoredWeight], progress: Progress) -> Scores:
    """Measure a run's model with W + B·A, in this process, as the run measured it with W + Δ.

    Args:
        run: the run.
        weights: the factored weights.
        progress: shows how far it is.

    Raises:
        RunFolderError: what the run measured, or measured on, is not there any more.
    """
    try:
        job = load_job(run.store.join("job.yaml"))
        asked = _Asked.of(run, job)
        model, tokenizer = _opened(run, weights)
        texts = _texts(run, job, tokenizer, model.config, weights[0].shape[1])
    except (InputError, StorageError) as error:
        raise RunFolderError(
            f"the scores of the truncated edit cannot be measured: {error}; bring back what is "
            "missing, export without --rank and --energy, or give --no-measure"
        ) from None
    with progress.stage(MEASURE) as bar:
        how = How.of(job.evaluate, job.seed)
        meter = MeasurementMeter(bar, len(asked.requests), texts)
        asking = AskingHere(asked.requests, asked.rows, asked.answered, texts, how, meter)
        measured = asking.model(model, tokenizer, asked.base)
    dtype = str(model.dtype).removeprefix("torch.")
    return Scores(
        figures_of(measured, asked.edited, asked.base),
        intervals_of(measured, asked.edited, asked.base),
        f"{model.device.type}, {dtype}",
    )


@dataclass(frozen=True)
class _Asked:
    """What a run asked its models.

    Attributes:
        requests: the measured requests, with their questions.
        rows: their input rows.
        answered: numbers of those that were answered in a model's own words.
        edited: input rows of the edited requests.
        base: the base model's measurement.
    """

    requests: list[EditRequest]
    rows: list[Row]
    answered: frozenset[int]
    edited: list[Row]
    base: Measurement

    @classmethod
    def of(cls, run: RunRecord, job: JobConfig) -> _Asked:
        if not run.store.exists(_BEFORE):
            raise RunFolderError(f"{run.store.join(_BEFORE)}, the base model's answers, is missing")
        base = Measurement.from_json(run.store.read_json(_BEFORE))
        table = run.store.read_table("results.parquet")
        places = {row: place for place, row in enumerate(table.column("row").to_pylist())}
        rows = sorted(base.rows)
        if lost := [row for row in rows if row not in places]:
            raise RunFolderError(f"results.parquet lacks row {lost[0]}, which the run measured")
        questions = ChatQuestions.read(job.evaluate.questions)
        requests = Requests([table], [places[row] for row in rows])
        return cls(
            [
                questions.to_ask(request, Row(places[row]), table)
                for row, request in zip(rows, requests, strict=True)
            ],
            rows,
            frozenset(i for i, row in enumerate(rows) if "answer" in base.rows[row]),
            [Row(row["row"]) for row in run.results if row["status"] == "edited"],
            base,
        )


def _opened(run: RunRecord, weights: Sequence[FactoredWeight]) -> tuple[Any, Any]:
    """The run's model with W + B·A, and its tokenizer."""
    source = ModelSource(run.store.join(MODEL), torch.cuda.is_available())
    model, tokenizer = source.open()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weights:
            parameters[weight.parameter].copy_(weight.edited())
    return model, tokenizer


def _texts(
    run: RunRecord, job: JobConfig, tokenizer: Any, config: Any, key_width: int
) -> list[str]:
    """The held-out texts of the run; none without a corpus."""
    if job.corpus is None:
        return []
    wanted = None if job.corpus_tokens == "auto" else job.corpus_tokens
    corpus = read_again(job.corpus, tokenizer, key_width, max_length=longest(config), tokens=wanted)
    if corpus.digest != run.run["digests"].get("corpus"):
        raise RunFolderError(f"corpus {', '.join(job.corpus)} has changed since the run")
    evaluate = job.evaluate
    return held_out(corpus.texts, evaluate.perplexity_texts, evaluate.perplexity_tokens)
