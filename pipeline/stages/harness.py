"""The stage that measures a model on tasks of lm-evaluation-harness.

This process builds the requests and judges the answers; the workers only answer. A task's scores
are recorded as soon as it is done, and the base model's are also kept in the job's store of
measurements, under the digest of everything that is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cluster import Task
from pipeline.evaluation import rounded
from pipeline.events import StageName
from pipeline.harness import (
    Answer,
    HarnessTasks,
    Part,
    TaskScores,
    answer,
    compared,
    interval_of_mean,
    largest_drop,
    mean_of,
)
from pipeline.models import ModelSource
from pipeline.progress import Stage
from pipeline.stages.context import Context
from pipeline.stages.measurement_store import MeasurementStore
from pipeline.storage import digest_of

FIGURE = "harness"
_STAGES = {"before": StageName.HARNESS_BEFORE, "after": StageName.HARNESS_AFTER}


def measure_harness(run: Context, name: str, source: ModelSource) -> list[TaskScores]:
    """The scores of a model in each task that the job names; none if it names none.

    Args:
        run: the run.
        name: ``before`` or ``after``.
        source: the model.
    """
    tasks = run.plan.harness
    if tasks is None:
        return []
    kept = MeasurementStore.of(run.plan) if source == run.plan.base else None
    found = _recorded(run, name, tasks)
    if kept is not None:
        keys = {_stored(key): task for task, key in tasks.keys.items() if task not in found}
        stored = kept.read(set(keys))
        found |= {keys[key]: TaskScores.from_json(value) for key, value in stored.items()}
    todo = [task for task in tasks.keys if task not in found]
    if todo:
        requests = sum(tasks.requests[task] for task in todo)
        with run.stage(_STAGES[name], requests) as (bar, detail):
            detail |= {"tasks": len(todo), "requests": requests}
            if len(todo) < len(tasks.keys):
                detail["stored"] = len(tasks.keys) - len(todo)
            for task in todo:
                found[task] = tasks.scores(task, _asking(run, name, source, task, bar))
                _record(run, name, tasks, found)
                if kept is not None:
                    kept.write({_stored(tasks.keys[task]): found[task].as_json()})
    else:
        _record(run, name, tasks, found)
    return tasks.named(found)


def _stored(key: str) -> str:
    return digest_of([FIGURE, key])


def _recorded(run: Context, name: str, tasks: HarnessTasks) -> dict[str, TaskScores]:
    """The scores in the run folder of tasks that are still the same."""
    held = (run.folder.recorded(f"harness-{name}") or {}).get("scores", {})
    return {
        task: TaskScores.from_json(held[key]) for task, key in tasks.keys.items() if key in held
    }


def _record(run: Context, name: str, tasks: HarnessTasks, found: Mapping[str, TaskScores]) -> None:
    scores = {tasks.keys[task]: own.as_json() for task, own in found.items()}
    run.folder.record(f"harness-{name}", {"scores": scores})


def _asking(
    run: Context, name: str, source: ModelSource, task: str, bar: Stage
) -> Callable[[list[Part]], list[list[Answer]]]:
    """Return a function that has the workers answer parts of a task's requests."""

    def ask(parts: list[Part]) -> list[list[Answer]]:
        kind = parts[0].kind if parts else ""
        names = [f"harness {name} {task} {kind} {number}" for number in range(len(parts))]
        answers: dict[str, list[Answer]] = {}

        def take(done: Task, value: list[Answer]) -> None:
            answers[done.key] = value
            bar.advance(len(value))

        bar.note(task)
        work = [Task(key, (source, part)) for key, part in zip(names, parts, strict=True)]
        run.map("answer_harness", work, take)
        return [answers[key] for key in names]

    return ask


def harness_here(tasks: HarnessTasks, model: Any, tokenizer: Any, bar: Stage) -> list[TaskScores]:
    """The scores of an open model in each task, measured in this process."""

    def ask(parts: list[Part]) -> list[list[Answer]]:
        answers = []
        for part in parts:
            answers.append(answer(model, tokenizer, part))
            bar.advance(len(part.arguments))
        return answers

    return tasks.named({task: tasks.scores(task, ask) for task in tasks.keys})


def add_harness(
    metrics: dict[str, Any],
    tasks: HarnessTasks | None,
    before: Sequence[TaskScores],
    after: Sequence[TaskScores],
) -> None:
    """Add the scores of both models to ``metrics.json``, and their mean to the figures."""
    if tasks is None:
        return
    rows = compared(before, after)
    settings = {"version": tasks.version, "limit": tasks.config.limit}
    metrics[FIGURE] = {**settings, "largest_drop": largest_drop(rows), "tasks": rows}
    for when, scores in (("before", before), ("after", after)):
        metrics[when][FIGURE] = mean_of(scores)
        if interval := interval_of_mean(scores):
            metrics["intervals"][when] |= rounded({FIGURE: interval})
