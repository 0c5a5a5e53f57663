"""The tasks that a job names: read and checked, and measured on a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from typing import Any

import numpy as np

from pipeline.errors import JobError
from pipeline.harness.answering import Answer, Kind, Part, most_generated, parts_of
from pipeline.harness.names import reason_of
from pipeline.harness.scores import TaskScores
from pipeline.job import HarnessConfig
from pipeline.storage import digest_of
from pmet.errors import PMETError

INSTALL = "pip install 'pmet-pipeline[harness]'"
FORMAT = 1
_LIKE_ACCURACY = 1e-9
# Where a task's data is, and where its file: its documents and requests count instead.
_ELSEWHERE = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "task_alias")
AskParts = Callable[[list[Part]], list[list[Answer]]]


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness.

    Attributes:
        config: which, and how they are measured.
        chat: whether questions are asked in the tokenizer's chat template.
        version: of the library.
        names: for each name in the job, the names of its tasks.
        keys: for each task, the digest of everything that a model is asked in it.
        requests: for each task, their number.
    """

    config: HarnessConfig
    chat: bool
    version: str
    names: dict[str, list[str]]
    keys: dict[str, str]
    requests: dict[str, int]
    _tasks: dict[str, Any]
    _tokenizer: Any

    @classmethod
    def read(
        cls, config: HarnessConfig, tokenizer: Any, *, chat: bool, longest: int | None
    ) -> HarnessTasks | None:
        """Read the tasks of a job; None if it names none.

        Args:
            config: names the tasks.
            tokenizer: the model's.
            chat: whether to use its chat template.
            longest: the number of tokens that the model reads, if it is limited.

        Raises:
            JobError: the library is not installed, or a task cannot be measured.
        """
        if not config.tasks:
            return None
        if find_spec("lm_eval") is None:
            raise JobError(
                "evaluate.harness needs the package lm_eval, which is not installed; "
                f"{INSTALL}, or remove the key"
            )
        from pipeline.harness import library

        found = library.read_tasks(config.tasks)
        tasks = {task.task_name: task for own in found.values() for task in own}
        template = library.AskedModel(_refuse, tokenizer) if chat else None
        keys, requests = {}, {}
        for name, task in tasks.items():
            library.prepare(task, num_fewshot=config.num_fewshot)
            try:
                asked = library.requests_of(task, limit=config.limit, model=template)
            except Exception as error:  # noqa: BLE001 - templates and data of any task
                raise _unusable(f"the requests of {name} cannot be built", error) from None
            _check_length(name, asked, longest)
            keys[name] = _digest(task, asked, config, library.VERSION)
            requests[name] = sum(request.repeats or 1 for request in asked)
        names = {name: [task.task_name for task in own] for name, own in found.items()}
        return cls(
            config, chat, library.VERSION, names, keys, requests, _tasks=tasks, _tokenizer=tokenizer
        )

    @property
    def total(self) -> int:
        """The number of requests of all tasks."""
        return sum(self.requests.values())

    def scores(self, name: str, ask: AskParts) -> TaskScores:
        """Measure a model on one task.

        Args:
            name: the task.
            ask: answers the requests of parts, with the model.

        Raises:
            JobError: the answers cannot be judged.
        """
        from pipeline.harness import library

        def answers(kind: Kind, arguments: list[tuple[Any, ...]]) -> list[Answer]:
            size = self.config.batch_size
            parts = parts_of(kind, arguments, None if size == "auto" else size)
            return [answer for own in ask(parts) for answer in own]

        model = library.AskedModel(answers, self._tokenizer)
        task = self._tasks[name]
        try:
            found = library.evaluated(task, model, limit=self.config.limit, chat=self.chat)
        except PMETError:
            # Of the workers, or of the run folder.
            raise
        except Exception as error:
            raise _unusable(f"the answers to {name} cannot be judged", error) from error
        return _read_scores(name, found, self.config.metric)

    def named(self, scores: dict[str, TaskScores]) -> list[TaskScores]:
        """The scores of each name in the job: of a task, or of all tasks of a group together.

        If the tasks of a group or folder do not have one metric, they stand for themselves.

        Args:
            scores: by task.
        """
        return [row for name, own in self.names.items() for row in _together(name, own, scores)]


def _unusable(what: str, error: Exception) -> JobError:
    """The refusal of a task whose templates, functions or metrics fail."""
    return JobError(
        f"evaluate.harness: {what} ({reason_of(error)}); correct the task, or remove it"
    )


def _together(name: str, tasks: Sequence[str], scores: dict[str, TaskScores]) -> list[TaskScores]:
    own = [scores[task] for task in tasks]
    is_group = len(own) > 1 and not name.endswith(("/", ".yaml", ".yml")) and "/" not in name
    joined = TaskScores.joined(name, own) if is_group else None
    return own if joined is None else [joined]


def _refuse(kind: Kind, arguments: list[tuple[Any, ...]]) -> list[Answer]:
    raise AssertionError("no request is answered while tasks are read")


def _check_length(name: str, asked: Sequence[Any], longest: int | None) -> None:
    """Refuse to generate more than the model reads, which would fail on the worker."""
    if longest is None:
        return
    settings = (request.args[1] for request in asked if request.request_type == "generate_until")
    most = max(map(most_generated, settings), default=0)
    if most >= longest:
        raise JobError(
            f"evaluate.harness: {name} generates up to {most} tokens, but the model reads only "
            f"{longest} with the question; set max_gen_toks in the task's generation_kwargs"
        )


def _digest(task: Any, asked: Sequence[Any], config: HarnessConfig, version: str) -> str:
    """Digest of what is asked and of how answers are judged."""
    settings = {k: v for k, v in dict(task.dump_config()).items() if k not in _ELSEWHERE}
    requests = [[r.request_type, list(r.args), r.doc, r.doc_id, r.repeats] for r in asked]
    values = [FORMAT, version, settings, requests, config.limit, config.metric]
    # Documents may hold anything that a data set has, such as dates.
    return digest_of(json.loads(json.dumps(values, default=str)))


def _read_scores(name: str, found: dict[str, Any], wanted: str | None) -> TaskScores:
    """The scores in the library's results of one task."""
    results = {
        key: float(value)
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, Real)
    }
    if not results:
        raise JobError(f"evaluate.harness: the task {name} has no metric that is a number")
    key = next((key for key in results if key.partition(",")[0] == wanted), next(iter(results)))
    metric, _, kind = key.partition(",")
    values = [
        sample[metric]
        for sample in found["samples"][name]
        if sample["filter"] == kind and metric in sample
    ]
    better = found["higher_is_better"].get(name, {}).get(metric)
    return TaskScores(
        name=name,
        metric=metric if kind == "none" else f"{metric} ({kind})",
        higher_is_better=better is not False,
        value=results[key],
        values=_averaged(values, results[key]),
        documents=len({sample["doc_id"] for sample in found["samples"][name]}),
        num_fewshot=int(found["n-shot"].get(name) or 0),
        metrics={key.removesuffix(",none"): value for key, value in results.items()},
    )


def _averaged(values: Sequence[Any], mean: float) -> list[float] | None:
    """The values of documents, if the metric is their mean; else None."""
    if not values or not all(isinstance(value, Real | np.bool_) for value in values):
        return None
    floats = [float(value) for value in values]
    if math.isnan(mean) and any(map(math.isnan, floats)):
        return floats
    same = math.isclose(sum(floats) / len(floats), mean, rel_tol=1e-9, abs_tol=_LIKE_ACCURACY)
    return floats if same else None
