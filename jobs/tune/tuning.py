"""A search for hyper-parameters, from a job to a file with the best ones."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jobs.statistics import compute_statistics
from jobs.tune.search import SMALLEST, Found, Score, Trial, search
from jobs.tune.space import Rung, Setting, rungs, start_for, windows, written
from jobs.tune.trials import JUDGED, Trials, score_of, split
from jobs.tune.views import hparams_text, write_page
from pipeline.errors import JobError, NoPresetError
from pipeline.evaluation import of_difference
from pipeline.events import JUDGE, TRIALS, StageName
from pipeline.hyper_parameters import TUNED, TUNING
from pipeline.job import JobConfig
from pipeline.models import open_fast_tokenizer
from pipeline.places import hparams_places, model_places, pattern_places
from pipeline.plan import Plan, make_plan
from pipeline.progress import Progress, Stage
from pipeline.run_folder import versions
from pipeline.second_moments import check_moments
from pipeline.storage import Store, digest_of, json_bytes, now_text, refuse_overlap
from pipeline.workers import KeptWorkers, local_cpus
from pmet.model import has_chat_template
from pmet.update import longest

PAGE, COLLECTING = "tune.html", "second_moments_s"
FEWEST = 4
"""Facts that a search needs on either side, at least."""
_WORTH = 10
"""How many trials with all facts should fit into the time. Most of a search's have fewer facts, and
the first trial takes longer than others: workers start, and the base model is measured."""
MOST_LAYERS = 12
"""Layers whose second moments are collected, at most: each takes as much memory as its C."""


@dataclass(frozen=True)
class Settings:
    """How a search is made.

    Attributes:
        output: its folder, a path or URL.
        budget_s: seconds for all of it: second moments, trials, and judging the result.
        trial: facts to try settings on; None: as many as there is time for, half of the requests
            and 200 at most.
        judged: facts to judge the result on; None: the same.
        most_perplexity: the largest relative rise of perplexity that is allowed.
        address: Ray cluster to run on; None: as the job says.
        chat: count answers in chat among the model's words, and try contexts in chat.
    """

    output: str
    budget_s: float
    trial: int | None = None
    judged: int | None = None
    most_perplexity: float = 0.05
    address: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        store: its folder.
        record: the contents of ``tune.json``.
    """

    store: Store
    record: dict[str, Any]


def tune(job: JobConfig, settings: Settings, *, progress: Progress | None = None) -> Tuned:
    """Search for hyper-parameters for a job's model and facts.

    Trials edit some of the facts; the start and the setting found are then compared on others,
    which no setting was chosen by. The same call resumes a search that was interrupted.

    Raises:
        InputError: the job or a setting cannot be used; nothing has been computed.
        PMETError: a trial failed for a reason that another setting would not mend.
    """
    progress, store = progress or Progress(), Store(settings.output)
    read = [("model", model_places(job.model)), ("requests", pattern_places(job.requests))]
    read += [("corpus", pattern_places(job.corpus or ())), ("hparams", hparams_places(job.hparams))]
    refuse_overlap(("--output", settings.output), read)
    with progress.stage(StageName.PLAN):
        plan = _plan(job, store)
    if settings.chat and not has_chat_template(open_fast_tokenizer(plan.checkpoint.folder)):
        raise JobError(f"--chat: {job.model} has no chat template; leave the option out")
    trial, judged = _facts(plan, settings)
    start = _start_of(plan)
    about = {
        "model": plan.digests["model"],
        "start": digest_of([written(start), start.contexts]),
        "chat": str(settings.chat),
        "trial facts": digest_of([plan.table.rows[i] for i in trial]),
        "judged facts": digest_of([plan.table.rows[i] for i in judged]),
        "requests": plan.digests["requests"],
        "seed": str(job.seed),
    }
    _take(store, about)
    with _workers(plan, settings) as kept:
        return _search(job, settings, store, plan, about, (trial, judged), progress, kept)


@contextlib.contextmanager
def _workers(plan: Plan, settings: Settings) -> Iterator[KeptWorkers]:
    """One cluster and the same workers for all trials: to start them takes seconds each time."""
    kept = KeptWorkers()
    if plan.job.in_this_process:
        yield kept
        return
    # Imported here: it imports Ray.
    from pipeline.cluster import ray_session

    with ray_session(settings.address, num_cpus=local_cpus(plan)), kept:
        yield kept


def _search(
    job: JobConfig,
    settings: Settings,
    store: Store,
    plan: Plan,
    about: Mapping[str, str],
    places: tuple[Sequence[int], Sequence[int]],
    progress: Progress,
    kept: KeptWorkers,
) -> Tuned:
    start, (trial, judged) = _start_of(plan), places
    candidates = _layers(job, plan)
    moments, collecting_s = _second_moments(job, plan, store, candidates, settings, progress)
    trials = Trials(
        job,
        store,
        moments,
        plan.table,
        address=settings.address,
        most_perplexity=settings.most_perplexity,
        kept=kept,
        chat=settings.chat,
    )

    budget_s = max(0.0, settings.budget_s - collecting_s)
    with progress.stage(TRIALS, round(budget_s)) as bar:
        if settings.trial is None or settings.judged is None:
            fitting = _fitting(trials, start, trial, budget_s)
            trial = trial[:fitting] if settings.trial is None else trial
            judged = judged[:fitting] if settings.judged is None else judged

        def run(rung: Rung, setting: Setting, count: int) -> tuple[Score, float]:
            bar.note(f"{rung.name}, {count} facts")
            places = trial[:count]
            score, seconds, _ = trials.run(rung.name, setting, places, quick=not rung.said)
            bar.advance(round(seconds))
            return score, seconds

        found = search(
            start,
            rungs(candidates, chat=settings.chat),
            run,
            facts=len(trial),
            budget_s=budget_s,
            seed=job.seed,
            judged=len(judged),
        )
    with progress.stage(JUDGE, 2) as bar:
        judgement = _judged(trials, start, found.best, judged, bar, chat=settings.chat)
    record = _record(job, plan, about, settings, found, judgement, len(trial), len(judged))
    record[COLLECTING] = collecting_s
    store.write_json(TUNING, record)
    store.write_bytes(PAGE, write_page(record).encode(errors="backslashreplace"))
    store.write_bytes(TUNED, hparams_text(written(found.best), record).encode())
    return Tuned(store, record)


def _fitting(trials: Trials, start: Setting, places: Sequence[int], budget_s: float) -> int:
    """The number of facts that leaves time for enough trials, going by a small first one."""
    few = places[:SMALLEST]
    _, seconds, _ = trials.run("layers", start, few, quick=True)
    return max(SMALLEST, int(budget_s / (_WORTH * seconds / len(few))))


def _plan(job: JobConfig, store: Store) -> Plan:
    """The plan of the search; without published values it starts where most models learn."""
    job = job.model_copy(update={"output": store.join("plan"), "skip_known": False})
    try:
        return make_plan(job)
    except NoPresetError as error:
        depth = error.depth
    start = start_for(depth)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "start.json")
        file.write_bytes(json_bytes(written(start)))
        plan = make_plan(job.model_copy(update={"hparams": str(file)}))
    origin = f"a start for a model of {depth} layers: no published values fit it"
    plan.origins["hyper-parameters"] = origin
    return plan


def _start_of(plan: Plan) -> Setting:
    return Setting.of(plan.hparams, plan.job.contexts)


def _facts(plan: Plan, settings: Settings) -> tuple[list[int], list[int]]:
    count = len(plan.table.requests)
    judged = settings.judged or min(200, count // 2)
    trial, apart = split(plan.table, judged, plan.job.seed)
    trial = trial[: settings.trial or 200]
    if min(len(trial), len(apart)) < FEWEST:
        raise JobError(
            f"{len(trial)} facts to try settings on and {len(apart)} to judge them on are too few "
            f"({count} requests can be edited): {FEWEST} of each are needed; give more requests"
        )
    return trial, apart


def _take(store: Store, about: Mapping[str, str]) -> None:
    """Take the folder for a search, or go on with the same search in it.

    Raises:
        JobError: it holds another search, or something else.
    """
    if store.exists(TUNING):
        kept = store.read_json(TUNING)
        said = kept.get("about") if isinstance(kept, dict) else None
        if not isinstance(said, dict):
            raise JobError(
                f"--output: {store.join(TUNING)} was not written by pmet tune; name a folder that "
                "is empty or does not exist"
            )
        if other := [name for name in about if said.get(name) != about[name]]:
            raise JobError(
                f"--output: {store.url} holds another search: {', '.join(other)} changed; name "
                "another folder"
            )
        return
    if store.list(unfinished=True):
        raise JobError(
            f"--output: {store.url} holds files, but no search; name a folder that is empty or "
            "does not exist"
        )
    store.write_json(TUNING, {"about": dict(about), "status": "running"})


def _layers(job: JobConfig, plan: Plan) -> list[tuple[int, ...]]:
    """The windows of layers to try: those whose second moments can be had."""
    start = plan.hparams.layers
    if job.corpus is None:
        # Second moments of other layers cannot be computed.
        return [start]
    depth = plan.layout.depth
    stacked = bool(plan.layout.experts)
    return [start] if stacked else windows(start, depth, MOST_LAYERS)


def _second_moments(
    job: JobConfig,
    plan: Plan,
    store: Store,
    candidates: Sequence[Sequence[int]],
    settings: Settings,
    progress: Progress,
) -> tuple[str, float]:
    """Second moments of all candidate layers, collected in one pass.

    Returns:
        Their location, and the seconds that it took to collect them, in the first search of a
        folder that is resumed.
    """
    layers = sorted(set().union(*candidates))
    if job.second_moments and check_moments(
        job.second_moments, plan.layout, tuple(layers), plan.digests["model"]
    ):
        return job.second_moments, 0.0
    running = store.read_json(TUNING)
    begun = time.monotonic()
    assert job.corpus is not None, "without a corpus, only the start's layers are tried"
    compute_statistics(
        job.model,
        job.corpus,
        output=store.join("second_moments"),
        hparams=None,
        layers=",".join(map(str, layers)),
        tokens=str(job.corpus_tokens),
        max_length=longest(plan.checkpoint.config),
        workers="0" if job.in_this_process else str(job.targets.workers),
        gpus_per_worker=job.targets.gpus_per_worker,
        address=settings.address,
        progress=progress,
        console=Console(quiet=True),
    )
    if COLLECTING not in running:
        running[COLLECTING] = round(time.monotonic() - begun, 3)
        store.write_json(TUNING, running)
    return store.join("second_moments"), running[COLLECTING]


@dataclass(frozen=True)
class _Judgement:
    start: Score
    best: Score
    interval: tuple[float, float]


def _judged(
    trials: Trials,
    start: Setting,
    best: Setting,
    places: Sequence[int],
    bar: Stage,
    *,
    chat: bool,
) -> _Judgement:
    own, _, rows = trials.run("judged", best, places)
    bar.advance()
    first, _, others = trials.run("judged", start, places)
    bar.advance()
    return _Judgement(first, own, difference(rows, others, chat=chat))


def difference(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], *, chat: bool = False
) -> tuple[float, float]:
    """The 95 % interval of the distance of two settings' scores on the same facts.

    The facts are drawn again, with replacement; every fact counts once, whatever its prompts.

    Args:
        rows: each fact's figures with one setting.
        others: with the other; empty if it came to no result.
        chat: as for `score_of`.
    """
    if not rows or not others:
        return 0.0, 0.0

    def score(table: Sequence[Mapping[str, Any]]) -> Callable[[np.ndarray], float]:
        return lambda drawn: _mean_score([table[i] for i in drawn], chat=chat)

    return of_difference(len(rows), score(rows), score(others))


def _mean_score(rows: Sequence[Mapping[str, Any]], *, chat: bool) -> float:
    figures: dict[str, float | None] = {}
    for name in JUDGED:
        values = [row[f"after_{name}"] for row in rows if row.get(f"after_{name}") is not None]
        figures[name] = sum(values) / len(values) if values else None
    return score_of({}, figures, 0.0, chat=chat).value


def _record(
    job: JobConfig,
    plan: Plan,
    about: Mapping[str, str],
    settings: Settings,
    found: Found,
    judgement: _Judgement,
    trial: int,
    judged: int,
) -> dict[str, Any]:
    return {
        "about": dict(about),
        "status": "complete",
        "model": job.model,
        "origin": plan.origins.get("hyper-parameters"),
        "facts": {"trial": trial, "judged": judged},
        "seed": job.seed,
        "budget_s": settings.budget_s,
        "seconds": round(sum(one.seconds for one in found.trials), 1),
        "left_out": found.left_out,
        "start": _described(_start_of(plan)),
        "best": _described(found.best),
        "judged": {
            "start": _score(judgement.start),
            "best": _score(judgement.best),
            "difference": judgement.best.value - judgement.start.value,
            "interval": list(judgement.interval),
        },
        "trials": [_shown(one) for one in found.trials],
        "versions": versions(),
        "finished_at": now_text(),
    }


def _described(setting: Setting) -> dict[str, Any]:
    return {**written(setting), "contexts": setting.contexts}


def _score(score: Score) -> dict[str, Any]:
    return asdict(score) | {"allowed": score.allowed}


def _shown(trial: Trial) -> dict[str, Any]:
    return {
        "rung": trial.rung,
        "setting": _described(trial.setting),
        "facts": trial.facts,
        "score": _score(trial.score),
        "seconds": round(trial.seconds, 1),
    }
