"""Trials: each an ordinary job on some of the facts, in a run folder of its own.

All trials share the targets, the second moments, the context templates and the base model's
measurements, so that a trial that differs in the update alone computes nothing but that. A
finished trial is not repeated; an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.tune.search import Score
from jobs.tune.space import Setting, written
from pipeline.data import RequestTable
from pipeline.errors import NothingToEditError
from pipeline.job import GatesConfig, HarnessConfig, JobConfig, TrackingConfig
from pipeline.run import run_job
from pipeline.run_folder import files_made, read_columns
from pipeline.storage import Store, digest_of, json_bytes
from pipeline.workers import KeptWorkers
from pmet.errors import NumericalError
from pmet.evaluation import SCORED, harmonic_mean
from pmet.model import Contexts

TEMPLATES = "context_templates.json"
PROBABILITY = SCORED
STRICT = tuple(f"{name}_strict" for name in SCORED)
SAID = ("efficacy_said", "generalization_said", "locality")
CHAT = "chat_said"
JUDGED = (*PROBABILITY, *SAID, CHAT)
"""The figures of each fact that two settings are compared by."""
FIGURES = (*PROBABILITY, *STRICT, *SAID, CHAT, "perplexity")
_TEXT, _QUICK_TEXT = 2048, 1024
"""Tokens of held-out text of a trial, and of a quick one: enough to notice a broken model."""
_SAID_BEFORE = 0.2
"""Strict specificity of a base model below which it tells nothing about an edit."""
_HEAVY = ("model/", "delta/", "targets/")


def score_of(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    most_perplexity: float,
    *,
    chat: bool = False,
) -> Score:
    """The mean of two harmonic means: of the probability form, and of what the model says.

    Where the model was not asked to say anything, the strict form stands for its words, and the
    share of its strict specificity that is left for its locality. A pretrained model seldom says
    the true object of a neighbor in the first place; then specificity in the probability form does.

    Args:
        before: the base model's figures.
        after: the edited model's.
        most_perplexity: the largest relative rise of perplexity that is allowed.
        chat: whether answers in chat count among the model's words.
    """
    measured = ([after.get(name) for name in PROBABILITY], _words(before, after, chat=chat))
    means = [
        mean
        for figures in measured
        if (mean := harmonic_mean([figure for figure in figures if figure is not None])) is not None
    ]
    base, now = before.get("perplexity"), after.get("perplexity")
    rise = 0.0 if base is None or now is None else now / base - 1
    value = sum(means) / len(means) if means else 0.0
    return Score(
        value, max(0.0, rise - most_perplexity), {name: after.get(name) for name in FIGURES}
    )


def _words(
    before: Mapping[str, Any], after: Mapping[str, Any], *, chat: bool
) -> list[float | None]:
    """Efficacy, generalization and locality in the model's own words, or in their place."""
    said = [after.get(name) for name in ((*SAID, CHAT) if chat else SAID)]
    if any(figure is not None for figure in said):
        return said
    learned, reached, kept = (after.get(name) for name in STRICT)
    if learned is None:
        return []
    base = before.get("specificity_strict")
    if base is None or base < _SAID_BEFORE:
        kept = after.get("specificity")
    elif kept is not None:
        kept = min(1.0, kept / base)
    return [learned, reached, kept]


def split(table: RequestTable, judged: int, seed: int) -> tuple[list[int], list[int]]:
    """Split requests into trial facts and judged ones, those of a subject together.

    Args:
        table: the requests.
        judged: how many are to be judged on, about.
        seed: decides which.

    Returns:
        Places of the trial facts and of the judged ones, each in an order drawn by the seed.
    """
    by_subject: dict[str, list[int]] = {}
    for place, request in enumerate(table.requests):
        by_subject.setdefault(request.subject, []).append(place)
    order = sorted(by_subject, key=lambda subject: digest_of([seed, subject]))
    apart: list[int] = []
    trial: list[int] = []
    for subject in order:
        (apart if len(apart) < judged else trial).extend(by_subject[subject])
    return trial, apart


class Trials:
    """Runs trials.

    Args:
        job: the job that hyper-parameters are sought for.
        store: the folder of the search.
        second_moments: their location.
        table: the requests.
        address: Ray cluster to run on.
        most_perplexity: as for `score_of`.
        kept: the workers that trials share, where they run on Ray.
        chat: as for `score_of`.
    """

    def __init__(
        self,
        job: JobConfig,
        store: Store,
        second_moments: str,
        table: RequestTable,
        *,
        address: str | None,
        most_perplexity: float,
        kept: KeptWorkers,
        chat: bool = False,
    ) -> None:
        self._job, self._store, self._moments, self._table = job, store, second_moments, table
        self._address, self._most, self._kept = address, most_perplexity, kept
        self._chat = chat

    def run(
        self, rung: str, setting: Setting, places: Sequence[int], *, quick: bool = False
    ) -> tuple[Score, float, list[dict[str, Any]]]:
        """Edit some facts; returns the score, the seconds that it took, and each fact's figures.

        Args:
            rung: what the trial is part of.
            setting: hyper-parameters and contexts.
            places: of the requests.
            quick: let the model say nothing, and measure little text; generation and text take
                longer than the edit of a few facts. Returns no figures of single facts.
        """
        values = written(setting)
        rows = [int(self._table.rows[place]) for place in places]
        folder = f"trials/{rung}-{digest_of([values, setting.contexts, rows, quick])[:16]}"
        done = f"{folder}/trial.json"
        if self._store.exists(done):
            kept = self._store.read_json(done)
            return Score(**kept["score"]), kept["seconds"], kept["rows"]
        begun = time.monotonic()
        self._store.write_bytes(f"{folder}/hparams.json", json_bytes(values))
        requests = self._table.table.take(pa.array(rows))
        self._store.write_table(f"{folder}/requests.parquet", requests)
        score, results = self._result(folder, setting.contexts, len(rows), quick=quick)
        seconds = time.monotonic() - begun
        self._store.write_json(
            done, {"score": vars(score), "seconds": round(seconds, 3), "rows": results}
        )
        return score, seconds, results

    def _result(
        self, folder: str, contexts: Contexts, count: int, *, quick: bool
    ) -> tuple[Score, list[dict[str, Any]]]:
        job = self._trial_job(folder, contexts, count, quick=quick)
        try:
            result = run_job(job, address=self._address, kept=self._kept)
        except (NumericalError, NothingToEditError) as error:
            return Score(0.0, failure=str(error)), []
        if not self._store.exists(templates := _templates_of(contexts)):
            self._store.write_bytes(templates, result.folder.read_bytes(TEMPLATES))
        before, after = result.metrics["before"], result.metrics["after"]
        score = score_of(before, after, self._most, chat=self._chat)
        rows = []
        if not quick:
            columns = [f"after_{name}" for name in JUDGED]
            rows = read_columns(result.folder, "results.parquet", columns).to_pylist()
        heavy = [name for name in files_made(result.folder) if name.startswith(_HEAVY)]
        result.folder.delete_files(heavy)
        return score, rows

    def _trial_job(self, folder: str, contexts: Contexts, count: int, *, quick: bool) -> JobConfig:
        job, join = self._job, self._store.join
        kept = _templates_of(contexts)
        templates = join(kept) if self._store.exists(kept) else job.context_templates
        return job.model_copy(
            update={
                "requests": (join(f"{folder}/requests.parquet"),),
                "output": join(f"{folder}/run"),
                "hparams": join(f"{folder}/hparams.json"),
                "second_moments": self._moments,
                "context_templates": templates,
                "contexts": contexts,
                "skip_known": False,
                "targets": job.targets.model_copy(
                    update={"store": job.targets.store or join("targets")}
                ),
                "evaluate": job.evaluate.model_copy(
                    update={
                        "store": job.evaluate.store or join("measurements"),
                        "sample": None,
                        "last": None,
                        "fluency": False,
                        "answers": 0 if quick else count,
                        "harness": HarnessConfig(),
                        "perplexity_tokens": min(
                            _QUICK_TEXT if quick else _TEXT, job.evaluate.perplexity_tokens
                        ),
                    }
                ),
                "gates": GatesConfig(),
                "tracking": TrackingConfig(),
            }
        )


def _templates_of(contexts: Contexts) -> str:
    """The file that keeps the context templates of all trials with these contexts."""
    return f"context_templates_{contexts}.json"
