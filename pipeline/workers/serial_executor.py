"""A run's workers and ranks without Ray: one replica and one rank, in this process, in turn.

Stages, retries and the isolation of rows are those of `pipeline.workers.ray_executor`. What only
another process can offer is missing: a task that hangs or kills its process ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from pipeline.cluster import (
    SerialPool,
    cause_here,
    full_text,
    limit_threads,
)
from pipeline.errors import WorkerError
from pipeline.events import OnEvent
from pipeline.plan import Plan
from pipeline.workers.executor import Executor
from pipeline.workers.sizes import local_sizes
from pipeline.workers.worker import ModelWorker
from pmet.errors import InputError, NumericalError


class SerialExecutor(Executor):
    """Computes all stages of one run in this process; use it as a context manager.

    Inside the ``with`` block torch uses as many threads as a worker has, so that results are equal
    to the bit. The replica and the rank are never in memory together.

    Args:
        plan: the run's plan.
        on_event: called with retries and failures.
    """

    ranks = 1

    def __init__(self, plan: Plan, on_event: OnEvent) -> None:
        self._plan, self._on_event = plan, on_event
        self._pool: SerialPool | None = None
        self._threads_before: int | None = None

    def __enter__(self) -> Self:
        self._threads_before = limit_threads(local_sizes(self._plan)[2])
        return self

    def __exit__(self, *exception: object) -> None:
        self.dismiss()

    def dismiss(self) -> None:
        """Release the model and restore torch's thread count; a second call does nothing."""
        self.release()
        limit_threads(self._threads_before)
        self._threads_before = None

    def release(self) -> None:
        """Release the model; the next stage that needs it opens it again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def check_ranks(self) -> None:
        """Do nothing: the rank needs no node of a cluster."""

    def expect_ranks(self, factory: type, init_args: tuple[Any, ...]) -> None:
        """Do nothing: the rank cannot start while this process computes targets."""

    def take_ranks(self, factory: type, init_args: tuple[Any, ...]) -> SerialRank:
        """Return the only rank, which the caller closes; the replica is released first.

        Raises:
            InputError, NumericalError, WorkerError: as for `SerialRank`.
        """
        self.release()
        return SerialRank(factory, init_args)

    def _started_pool(self) -> SerialPool:
        if self._pool is None:
            self._pool = SerialPool(
                ModelWorker, init_args=(self._plan.base,), on_event=self._on_event
            )
        return self._pool


class SerialRank:
    """A group of one rank in this process, with the calls and errors of `RankGroup`.

    Args:
        factory: class of the object that the rank holds; called as ``factory(None, *init_args)``.
        init_args: further arguments of the factory.
        threads: threads that torch computes with until the rank is closed; None: as many as before.

    Raises:
        InputError, NumericalError: raised by the factory.
        WorkerError: the factory failed otherwise.
    """

    def __init__(
        self, factory: type, init_args: tuple[Any, ...], threads: int | None = None
    ) -> None:
        self._threads_before = limit_threads(threads)
        try:
            self._held: Any = self._run("start", lambda: factory(None, *init_args))
        except BaseException:
            limit_threads(self._threads_before)
            raise

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call a method of the rank; see `call_each`."""
        return self.call_each(method, [args])

    def call_each(self, method: str, args_by_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the rank with the only tuple of arguments.

        Raises:
            InputError, NumericalError: as raised by the method.
            WorkerError: the method failed otherwise.
        """
        (args,) = args_by_rank
        return [self._run(method, lambda: getattr(self._held, method)(*args))]

    def close(self) -> None:
        """Release the rank and its model; a second call does nothing."""
        self._held = None
        limit_threads(self._threads_before)
        self._threads_before = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, doing: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (InputError, NumericalError):
            raise
        except Exception as error:
            failure = cause_here(error)
            raise WorkerError(
                f"the update failed in {doing}: {failure}",
                cause_text=full_text(error),
                kind=failure.kind,
            ) from error
