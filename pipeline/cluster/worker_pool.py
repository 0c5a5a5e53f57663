"""A supervised pool of workers on Ray.

Ray's own pool loses tasks when an actor dies, and Ray's retries restart an actor without limit; so
deaths, time and attempts are counted here, and Ray only starts and watches processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions as ray_exceptions

from pipeline.cluster.pool import OnResult, Pool, cannot_start
from pipeline.cluster.process import OUT_OF_MEMORY
from pipeline.cluster.session import (
    HeldInActor,
    cluster_resources,
    free_text,
    original,
    root_cause,
    worker_environment,
)
from pipeline.cluster.tasks import Attempt, TaskQueue
from pipeline.errors import NoRoomError
from pipeline.events import EventKind, OnEvent
from pipeline.failures import Failure
from pmet.errors import InputError

_TICK_S = 0.1
_LOOK_S = 5.0
# Enough, unless the model is large or the cluster has no room.
_SILENCE_S = 60.0
# After one of these the process is still alive, but its memory or GPU cannot be trusted.
# By name, not imported: an executor does not need torch.
_RUINOUS = OUT_OF_MEMORY | {"AcceleratorError"}


class WorkerPool(Pool):
    """Worker processes on a Ray cluster, one task in flight on each.

    A Python error in a task keeps the process; a process that dies, runs out of memory or exceeds
    the time limit is replaced at once. Each of these counts as an attempt of that task alone.
    Workers that the cluster has no room for stay requested, and the others work without them.
    Processes are started by the first stage that justifies them, and stay for later ones.

    Args:
        factory: class of the worker; called once in each process.
        count: maximum number of workers.
        grown: polled for a larger number, because the cluster may have grown.
        init_args: arguments of the factory.
        num_cpus: logical CPUs of one worker.
        num_gpus: GPUs of one worker; a fraction shares one.
        threads: threads of the numerical libraries in each worker. Set it if results must be
            bit-equal on any machine; None leaves it to Ray, which uses one per logical CPU.
        max_attempts: how often a task is attempted, and how often in a row a process is started.
        task_timeout_s: time limit of one call in seconds; no limit if None.
        start_timeout_s: seconds until a first worker must be ready.
        on_event: called with deaths, time-outs, retries and failures.

    Raises:
        ValueError: a count, a limit or a number of attempts is below one.
    """

    def __init__(
        self,
        factory: type,
        *,
        count: int,
        grown: Callable[[], int] | None = None,
        init_args: tuple[Any, ...] = (),
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        threads: int | None = None,
        max_attempts: int = 3,
        task_timeout_s: float | None = None,
        start_timeout_s: float = 900.0,
        on_event: OnEvent | None = None,
    ) -> None:
        if count < 1 or max_attempts < 1:
            raise ValueError(f"count {count} and max_attempts {max_attempts} must be at least 1")
        super().__init__(max_attempts, on_event)
        self._task_timeout_s = task_timeout_s
        self._start_timeout_s = start_timeout_s
        self._needs = f"{num_cpus:g} CPU and {num_gpus:g} GPU"
        self._start_args = (factory, init_args, threads)
        self._actor_class = ray.remote(_WorkerProcess).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": worker_environment(threads=threads)},
        )
        self._ever_ready = self._said_waiting = False
        self._seats = [_Seat(index) for index in range(count)]
        self._grown, self._next_look = grown, time.monotonic() + _LOOK_S

    def serve(self, on_event: OnEvent, grown: Callable[[], int] | None) -> None:
        """Report to someone else from now on, and ask there whether the cluster has grown."""
        self._on_event, self._grown = on_event, grown

    @property
    def absent(self) -> int:
        """The number of workers not started yet or still starting."""
        return sum(not seat.ready for seat in self._seats)

    def close(self) -> None:
        """See `Pool.close`."""
        self._closed = True
        for seat in self._seats:
            self._dismiss(seat)

    def _work_off(
        self, queue: TaskQueue, method: str, on_result: OnResult, workers: int | None
    ) -> None:
        self._greet()
        for seat in self._seats[:workers]:
            if seat.actor is None and seat.failed_starts < self._max_attempts:
                self._start(seat)
        while True:
            self._hand_out(method, queue)
            if queue.empty and not any(seat.attempt for seat in self._seats):
                return
            awaited = {seat.reply: seat for seat in self._seats if seat.reply is not None}
            ready, _ = ray.wait(list(awaited), num_returns=1, timeout=_TICK_S)
            for reply in ready:
                self._settle(awaited[reply], queue, on_result)
            self._end_overdue(queue)
            if not queue.empty:
                self._look_for_more_room(workers)

    def _look_for_more_room(self, workers: int | None) -> None:
        """Add seats if the cluster has grown, but no more than the stage justifies."""
        if self._grown is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        most = self._grown() if workers is None else min(workers, self._grown())
        for index in range(len(self._seats), most):
            self._seats.append(_Seat(index))
            self._start(self._seats[-1])

    def _hand_out(self, method: str, queue: TaskQueue) -> None:
        for seat in self._seats:
            if seat.idle and (attempt := queue.take()) is not None:
                seat.attempt = attempt
                seat.expect(seat.actor.call.remote(method, attempt.task.args))

    def _settle(self, seat: _Seat, queue: TaskQueue, on_result: OnResult) -> None:
        reply, attempt = seat.reply, seat.attempt
        seat.reply = seat.attempt = None
        try:
            value = ray.get(reply)
        except ray_exceptions.RayError as error:
            _raise_input_error(error)
            if attempt is None:
                self._start_failed(seat, error)
            else:
                self._attempt_failed(seat, attempt, error, queue)
            return
        if attempt is None:
            self._ever_ready = seat.ready = True
            seat.failed_starts = 0
        else:
            on_result(attempt.task, value)

    def _attempt_failed(
        self, seat: _Seat, attempt: Attempt, error: ray_exceptions.RayError, queue: TaskQueue
    ) -> None:
        failure = root_cause(error)
        if _process_is_lost(error):
            text = f"worker {seat.index} was lost on {attempt.task.key}: {failure}"
            attempt.report(self._on_event, EventKind.DEATH, text)
            self._start(seat)
        queue.failed(attempt, failure)

    def _start_failed(self, seat: _Seat, error: ray_exceptions.RayError) -> None:
        failure = root_cause(error)
        if seat.ready:
            self._on_event(EventKind.DEATH, f"worker {seat.index} was lost while idle: {failure}")
            self._start(seat)
            return
        self._dismiss(seat)
        seat.failed_starts += 1
        # If the factory raises at every worker's first start, it will keep raising.
        hopeless = isinstance(error, ray_exceptions.RayTaskError) and not self._ever_ready
        if not hopeless and seat.failed_starts < self._max_attempts:
            self._on_event(EventKind.START_FAILURE, f"worker {seat.index} did not start: {failure}")
            self._start(seat)
        elif hopeless or not any(seat.actor for seat in self._seats):
            raise cannot_start(failure, error)
        else:
            self._on_event(EventKind.START_FAILURE, f"worker {seat.index} is given up: {failure}")

    def _end_overdue(self, queue: TaskQueue) -> None:
        now = time.monotonic()
        for seat in self._seats:
            waited_s = now - seat.since
            if seat.attempt is not None:
                if self._task_timeout_s is not None and waited_s > self._task_timeout_s:
                    self._time_out(seat, seat.attempt, queue)
            elif seat.reply is not None and waited_s > self._start_timeout_s:
                self._refuse_to_wait()
            elif seat.reply is not None and waited_s > _SILENCE_S and not self._ever_ready:
                self._say_waiting()

    def _time_out(self, seat: _Seat, attempt: Attempt, queue: TaskQueue) -> None:
        failure = Failure(f"TimeoutError: hung, or took longer than {self._task_timeout_s:g} s")
        text = f"worker {seat.index} was ended on {attempt.task.key}: {failure}"
        attempt.report(self._on_event, EventKind.TIMEOUT, text)
        self._start(seat)
        queue.failed(attempt, failure)

    def _say_waiting(self) -> None:
        """Report once that no worker has started, and what each is waiting for."""
        if not self._said_waiting:
            self._said_waiting = True
            self._on_event(
                EventKind.WAITING,
                f"no worker is ready after {_SILENCE_S:g} s, waiting {self._start_timeout_s:g} s "
                f"at most: each needs {self._needs}, {free_text()}",
            )

    def _refuse_to_wait(self) -> None:
        if any(seat.attempt is not None or seat.idle for seat in self._seats):
            return
        cpus, gpus = cluster_resources()
        raise NoRoomError(
            f"no worker was ready within {self._start_timeout_s:g} s; each needs {self._needs}, "
            f"the cluster has {cpus:g} CPU and {gpus:g} GPU in all; ask for less, free the "
            "cluster, or allow more time if the model is slow to load"
        )

    def _start(self, seat: _Seat) -> None:
        self._dismiss(seat)
        seat.ready = False
        seat.actor = self._actor_class.remote()
        seat.expect(seat.actor.start.remote(*self._start_args))

    def _greet(self) -> None:
        """Find the workers that died while idle, so that no task loses an attempt to them."""
        for seat in self._seats:
            if seat.idle:
                seat.expect(seat.actor.ping.remote())

    def _dismiss(self, seat: _Seat) -> None:
        if seat.actor is not None and ray.is_initialized():
            ray.kill(seat.actor, no_restart=True)
        seat.actor = seat.reply = seat.attempt = None


class _WorkerProcess(HeldInActor):
    """The object in a worker's process: it wraps the factory's object in three calls."""

    def start(self, factory: type, init_args: tuple[Any, ...], threads: int | None) -> None:
        """Create the worker."""
        self._hold(factory, init_args, threads)

    def ping(self) -> None:
        """Answer."""


@dataclass
class _Seat:
    """A slot for one worker: its process, and the pending reply.

    Without an attempt, the reply is to a start or a ping.
    """

    index: int
    actor: Any = None
    reply: Any = None
    attempt: Attempt | None = None
    since: float = 0.0
    ready: bool = False
    failed_starts: int = 0

    @property
    def idle(self) -> bool:
        return self.actor is not None and self.reply is None

    def expect(self, reply: Any) -> None:
        self.reply = reply
        self.since = time.monotonic()


def _process_is_lost(error: ray_exceptions.RayError) -> bool:
    if isinstance(error, ray_exceptions.RayTaskError):
        return type(original(error)).__name__ in _RUINOUS
    return True


def _raise_input_error(error: ray_exceptions.RayError) -> None:
    if isinstance(error, ray_exceptions.RayTaskError):
        cause = original(error)
        if isinstance(cause, InputError):
            raise cause from None
