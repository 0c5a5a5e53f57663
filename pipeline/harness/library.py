"""lm-evaluation-harness itself: finding and reading tasks, and evaluating them on any model.

Only `pipeline.harness.tasks` imports this module, and only when a job names tasks: the library
takes seconds to import.
"""

from __future__ import annotations

import functools
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import datasets
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from pipeline.errors import JobError
from pipeline.harness.answering import Answer, Kind
from pipeline.harness.names import TaskNames, is_path, reason_of

VERSION = version("lm_eval")
BUNDLED = Path(lm_eval.__file__).parent / "tasks"
"""The task files that come with the library."""
KEY = "evaluate.harness"
SEED = 1234
"""Seed of the examples in front of questions: the library's default."""
_T = TypeVar("_T")
Ask = Callable[[Kind, list[tuple[Any, ...]]], list[Answer]]

# What matters of their warnings is in the errors; the others are about the library's own command.
for name in ("lm_eval", "datasets", "huggingface_hub.utils._http"):
    logging.getLogger(name).setLevel(logging.ERROR)
datasets.disable_progress_bars()
# Requests are built behind a progress bar, which would run across ours.
lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)


class AskedModel(LM):
    """A model as the library sees it, whose answers come from elsewhere.

    Args:
        ask: answers requests of one kind, in their order.
        tokenizer: the model's, whose chat template is used if there is to be one.
    """

    def __init__(self, ask: Ask, tokenizer: Any) -> None:
        super().__init__()
        self._answers, self._tokenizer = ask, tokenizer

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        """See `lm_eval.api.model.LM`."""
        return self._answers("loglikelihood", [request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Answer]:
        """See `lm_eval.api.model.LM`."""
        return self._answers("loglikelihood_rolling", [request.args for request in requests])

    def generate_until(self, requests: list[Instance]) -> list[Answer]:
        """See `lm_eval.api.model.LM`."""
        return self._answers("generate_until", [request.args for request in requests])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """See `lm_eval.api.model.LM`."""
        text: str = self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    @property
    def tokenizer_name(self) -> str:
        """Name under which the library caches requests, which it is not asked to do."""
        return ""


def read_tasks(named: Iterable[str]) -> dict[str, list[Any]]:
    """The library's tasks behind each name, file or folder.

    Their data sets are read, which downloads those of tasks that are not on this machine.

    Raises:
        JobError: there is no such task, or it cannot be read; one line for each.
    """
    names = list(dict.fromkeys(named))
    own = [name for name in names if is_path(name)]
    bundled = _Bundled.of([name for name in names if name not in own])
    # Before data sets are read, which may take minutes.
    _all(names, lambda name: _check_path(name) if name in own else bundled.check(name))
    with _seeded():
        found = _all(names, lambda name: _in_files(name) if name in own else bundled.tasks(name))
    _refuse_repeated(found)
    return found


def _all(names: Iterable[str], work: Callable[[str], _T]) -> dict[str, _T]:
    """The result for each name; raises the errors of all names as one."""
    found: dict[str, _T] = {}
    problems: list[str] = []
    for name in names:
        try:
            found[name] = work(name)
        except JobError as error:
            problems.append(str(error))
    if problems:
        raise JobError("\n".join(problems))
    return found


class _Bundled:
    """The tasks that come with the library, as far as some names need them."""

    def __init__(self, names: TaskNames, manager: Any) -> None:
        self._names, self._manager = names, manager

    @classmethod
    def of(cls, wanted: Iterable[str]) -> _Bundled:
        wanted = list(wanted)
        names = TaskNames.read(BUNDLED) if wanted else TaskNames(frozenset(), {})
        folders = names.folders(wanted)
        manager = _indexed(folders)
        # Groups have members in other folders.
        while more := names.folders(_reached(manager, wanted)) - folders:
            folders |= more
            manager = _indexed(folders)
        return cls(names, manager)

    def tasks(self, name: str) -> list[Any]:
        """The tasks of a name.

        Raises:
            JobError: one cannot be read.
        """
        return _loaded(self._manager, name, name)

    def check(self, name: str) -> None:
        """Refuse a name without a task.

        Raises:
            JobError: there is none.
        """
        if name not in self._manager.task_index:
            near = self._names.near(name)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
            raise JobError(
                f"{KEY}: lm-evaluation-harness {VERSION} has no task {name}; {hint} (the path of "
                "a task file has a slash, or ends in .yaml)"
            )


def _indexed(folders: Iterable[Path]) -> Any:
    return TaskManager(include_path=sorted(map(str, folders)), include_defaults=False)


def _reached(manager: Any, names: Iterable[str]) -> set[str]:
    """These names and those of all members of their groups, as far as they are in the index."""
    reached: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            entry = manager.task_index.get(name)
            if entry is not None:
                todo += entry.tags if entry.kind.name == "TAG" else _members(entry.cfg)
    return reached


def _members(group: Any) -> list[str]:
    """The names of a group's members; those of a group inside it are its members, too."""
    members = (group or {}).get("task")
    if not isinstance(members, list):
        return []
    inside = [m for m in members if isinstance(m, dict)]
    named = [*members, *(m.get(key) for m in inside for key in ("task", "group"))]
    own = [name for name in named if isinstance(name, str)]
    return [*own, *(name for m in inside for name in _members(m))]


def _check_path(name: str) -> None:
    path = Path(name).expanduser()
    if not path.exists():
        raise JobError(f"{KEY}: there is no file or folder {name}; give a path on this machine")


def _in_files(name: str) -> list[Any]:
    """The tasks of a file or folder that the job names."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(path.rglob("*.yaml"))
        tasks = [task for file in files for task in _in_file(file, name, whole=False)]
        if not tasks:
            raise JobError(f"{KEY}: {name} holds no task: no .yaml file in it has a key task")
        return tasks
    return _in_file(path, name, whole=True)


def _in_file(path: Path, name: str, *, whole: bool) -> list[Any]:
    """The task in a file; none if it is not one and need not be.

    Args:
        path: the file.
        name: the name in the job that it belongs to.
        whole: whether the name is the file's own.
    """
    try:
        settings = load_yaml(path, resolve_func=False)
        is_task = isinstance(settings.get("task"), str) and "group" not in settings
        if is_task:
            settings = load_yaml(path)
    except Exception as error:  # noqa: BLE001 - whatever its Python code raises
        raise _unreadable(str(path), error) from None
    if not is_task:
        if whole:
            raise JobError(f"{KEY}: {name} is not a task: it has no key task with a name")
        return []
    if files := (settings.get("dataset_kwargs") or {}).get("data_files"):
        beside = {**settings["dataset_kwargs"], "data_files": _beside(files, path.parent)}
        settings = {**settings, "dataset_kwargs": beside}
    return _loaded(TaskManager(include_defaults=False), settings, str(path))


def _beside(files: Any, folder: Path) -> Any:
    """Paths of data files; those that are not here are taken to be beside the task's file."""
    if isinstance(files, Mapping):
        return {split: _beside(own, folder) for split, own in files.items()}
    if isinstance(files, list | tuple):
        return [_beside(own, folder) for own in files]
    text = str(files)
    if "://" in text or Path(text).exists():
        return text
    return str((folder / text).resolve()) if (folder / text).exists() else text


def _loaded(manager: Any, spec: Any, name: str) -> list[Any]:
    try:
        tasks = list(manager.load([spec])["tasks"].values())
    except Exception as error:  # noqa: BLE001 - tasks and data sets fail in many ways
        raise _unreadable(name, error) from None
    for task in tasks:
        _check(task, name)
    return tasks


def _unreadable(name: str, error: Exception) -> JobError:
    offline = [
        key
        for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
        if os.environ.get(key, "0").lower() not in ("", "0", "false")
    ]
    if offline:
        cause = f"{offline[0]} is set: load it once without, or name a task with files of your own"
    else:
        cause = (
            "if its data set must be downloaded, this machine needs the network once; otherwise "
            "correct the task"
        )
    return JobError(f"{KEY}: {name} cannot be read ({reason_of(error)}); {cause}")


def _check(task: Any, name: str) -> None:
    """Refuse tasks that run what a model writes, or need more than text."""
    if getattr(task, "UNSAFE_CODE", False):
        raise JobError(
            f"{KEY}: {name} executes code that the model writes, which pmet does not; remove it"
        )
    if getattr(task, "MULTIMODAL", False):
        raise JobError(f"{KEY}: {name} needs images or sound, and pmet measures text; remove it")


def _refuse_repeated(found: Mapping[str, list[Any]]) -> None:
    by_task: dict[str, str] = {}
    for name, tasks in found.items():
        for task in tasks:
            first = by_task.setdefault(task.task_name, name)
            if first != name or sum(t.task_name == task.task_name for t in tasks) > 1:
                raise JobError(
                    f"{KEY}: the task {task.task_name} is there twice, in {first} and {name}; "
                    "name it once"
                )


def prepare(task: Any, *, num_fewshot: int | None) -> None:
    """Set the examples of a task as the library does; a task that sets none keeps none."""
    given = task.get_config("num_fewshot")
    if num_fewshot is not None and given != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif given is None:
        task.set_config(key="num_fewshot", value=0)


def requests_of(task: Any, *, limit: int | None, model: AskedModel | None) -> list[Instance]:
    """The requests of a task, as `evaluated` builds them too.

    Args:
        task: a prepared task.
        limit: documents, at most.
        model: the model whose chat template is used; None: without one.
    """
    task.set_fewshot_seed(seed=SEED)
    with _seeded():
        task.build_all_requests(
            limit=limit,
            apply_chat_template=model is not None,
            fewshot_as_multiturn=model is not None,
            chat_template=None if model is None else model.apply_chat_template,
        )
    instances: list[Instance] = task.instances
    return instances


def evaluated(task: Any, model: AskedModel, *, limit: int | None, chat: bool) -> dict[str, Any]:
    """The library's results of one task."""
    name = task.task_name
    task.set_fewshot_seed(seed=SEED)
    with _seeded():
        found: dict[str, Any] = evaluate(
            lm=model,
            task_dict={"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    return found


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators, from which tasks may draw; they are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
