"""Pools of workers, including one that computes in this process.

A *worker* is an object made by a factory (a class); a stage is one of its methods, called once
per *task*. A pool only decides which worker computes a task and when; results never depend on it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from pipeline.cluster.process import cause_here, full_text, limit_threads
from pipeline.cluster.tasks import Attempt, FailedTask, Task, TaskQueue
from pipeline.errors import WorkerError
from pipeline.events import OnEvent, ignore
from pipeline.failures import MEMORY_OF_WORKERS, Failure, remedy
from pmet.errors import InputError

OnResult = Callable[[Task, Any], None]

_SHOWN_SHARDS = 3


class Pool(ABC):
    """Runs tasks on workers made by one factory; use it as a context manager.

    Args:
        max_attempts: how often a task is attempted.
        on_event: called with retries, failures and other events.
    """

    def __init__(self, max_attempts: int, on_event: OnEvent | None) -> None:
        self._max_attempts = max_attempts
        self._on_event = on_event or ignore
        self._closed = False

    def run(
        self,
        method: str,
        tasks: Iterable[Task],
        on_result: OnResult,
        *,
        workers: int | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> list[FailedTask]:
        """Call ``worker.method(*task.args)`` for every task, handed out in their order.

        Results arrive in any order, each exactly once. May be called again, for another stage on
        the same workers. After an exception the pool is closed.

        Args:
            method: name of the worker's method.
            tasks: read lazily.
            on_result: called in this process with each task and the value its call returned.
            workers: how many workers the stage justifies: no more are started for it, but all
                workers that an earlier stage started take part. None: all.
            on_drained: called once, when the last task has been handed out.

        Returns:
            The tasks that failed in all allowed attempts, in the order of ``tasks``.

        Raises:
            InputError: raised by a worker and never retried, because it would only recur.
            WorkerError: no worker can start, or the pool is closed.
        """
        if self._closed:
            raise WorkerError("this pool is closed; make a new one to run another stage")
        queue = TaskQueue(tasks, self._max_attempts, self._on_event, on_drained)
        try:
            self._work_off(queue, method, on_result, workers)
        except BaseException:
            self.close()
            raise
        return queue.given_up()

    @property
    def closed(self) -> bool:
        """Whether it has ended its workers, and runs nothing any more."""
        return self._closed

    @abstractmethod
    def _work_off(
        self, queue: TaskQueue, method: str, on_result: OnResult, workers: int | None
    ) -> None:
        """Run tasks until none is left to be attempted or awaited; see `run`."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, even busy ones; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SerialPool(Pool):
    """One worker in this process: the same results, attempts and errors, without Ray.

    A task that hangs or kills its process takes this process with it.

    Args:
        factory: class of the worker.
        init_args: arguments of the factory.
        threads: torch threads while the pool is open; None leaves them unchanged.
        max_attempts: how often a task is attempted.
        on_event: called with retries and failures.
    """

    def __init__(
        self,
        factory: type,
        *,
        init_args: tuple[Any, ...] = (),
        threads: int | None = None,
        max_attempts: int = 3,
        on_event: OnEvent | None = None,
    ) -> None:
        super().__init__(max_attempts, on_event)
        self._factory = factory
        self._init_args = init_args
        self._worker: Any = None
        self._threads_before = limit_threads(threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def close(self) -> None:
        """See `Pool.close`."""
        self._worker = None
        self._closed = True
        limit_threads(self._threads_before)
        self._threads_before = None

    def _work_off(
        self, queue: TaskQueue, method: str, on_result: OnResult, workers: int | None
    ) -> None:
        if self._worker is None:
            self._worker = self._start()
        while (attempt := queue.take()) is not None:
            self._try(method, attempt, queue, on_result)

    def _start(self) -> Any:
        try:
            return self._factory(*self._init_args)
        except InputError:
            raise
        except Exception as error:
            raise cannot_start(cause_here(error), error) from error

    def _try(self, method: str, attempt: Attempt, queue: TaskQueue, on_result: OnResult) -> None:
        try:
            value = getattr(self._worker, method)(*attempt.task.args)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  any error of a task counts as an attempt
            queue.failed(attempt, cause_here(error))
        else:
            on_result(attempt.task, value)


def run_all(
    pool: Pool, method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]
) -> None:
    """Run all of a stage's tasks on a pool; ``take`` gets each result in this process.

    Raises:
        WorkerError: a task failed for good; the message gives its root cause.
    """
    failed = pool.run(method, tasks, take)
    if not failed:
        return
    shown = "; ".join(f"{f.task.key}: {f.failure}" for f in failed[:_SHOWN_SHARDS])
    raise WorkerError(
        f"{len(failed)} of {len(tasks)} tasks failed {failed[0].attempts} times each: {shown}. "
        f"Finished work is kept: {remedy((f.failure.kind for f in failed), MEMORY_OF_WORKERS)}",
        cause_text=failed[0].failure.text,
    )


def cannot_start(failure: Failure, error: BaseException) -> WorkerError:
    """The error of a pool in which no worker starts."""
    return WorkerError(f"no worker can start: {failure}", cause_text=full_text(error))
