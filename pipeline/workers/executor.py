"""The interface that runs a run's tasks: workers with a model each, and the ranks of the update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pipeline.cluster import FailedTask, OnResult, Pool, Task, run_all


class Ranks(AbstractContextManager["Ranks"], Protocol):
    """The ranks of one update; use it as a context manager."""

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank with the same arguments; return the results by rank."""

    def call_each(self, method: str, args_by_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every rank, each with its own arguments."""


class Executor(AbstractContextManager["Executor"]):
    """Runs the tasks of one run; use it as a context manager.

    The result of a task depends only on the job, never on the executor, which decides where and
    when it runs.
    """

    @property
    @abstractmethod
    def ranks(self) -> int:
        """The number of processes in the update group."""

    @abstractmethod
    def _started_pool(self) -> Pool:
        """The pool of workers, started by the first call."""

    def map(self, method: str, tasks: Sequence[Task], take: OnResult) -> None:
        """Run a stage's tasks on the workers; ``take`` gets each result in this process.

        Raises:
            WorkerError: a task failed for good; the message gives its root cause.
        """
        run_all(self._started_pool(), method, tasks, take)

    def try_all(
        self,
        method: str,
        tasks: Sequence[Task],
        take: OnResult,
        *,
        workers: int | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> list[FailedTask]:
        """Run a stage's tasks; return those that failed, see `pipeline.cluster.pool.Pool.run`."""
        pool = self._started_pool()
        return pool.run(method, tasks, take, workers=workers, on_drained=on_drained)

    def one(self, method: str, name: str, args: tuple[Any, ...]) -> Any:
        """Run a single task and return its result."""
        results: list[Any] = []
        self.map(method, [Task(name, args)], lambda _task, value: results.append(value))
        return results[0]

    @abstractmethod
    def check_ranks(self) -> None:
        """Wait for the nodes that the ranks need, before anything else is computed.

        Raises:
            NoRoomError: the cluster did not grow large enough in time.
        """

    @abstractmethod
    def expect_ranks(self, factory: type, init_args: tuple[Any, ...]) -> None:
        """Start the ranks early if no other process needs their resources."""

    @abstractmethod
    def take_ranks(self, factory: type, init_args: tuple[Any, ...]) -> Ranks:
        """Return the ranks, which the caller closes.

        Raises:
            InputError, NumericalError, WorkerError: the ranks could not start.
        """

    @abstractmethod
    def release(self) -> None:
        """End the workers; the next stage that needs them starts new ones."""

    @abstractmethod
    def dismiss(self) -> None:
        """End workers and ranks; the executor runs nothing afterwards."""
