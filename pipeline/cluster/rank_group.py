"""Ranks that compute together: one Ray actor each, placed as one group, which fails as a whole.

In a collective operation every rank waits for all others, so losing one loses the group: at the
first error all ranks are ended, and the caller creates another group, which resumes from the
finished work.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Self

import ray
from ray import exceptions as ray_exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.session import (
    HeldInActor,
    cluster_resources,
    free_text,
    full_text,
    original,
    root_cause,
    worker_environment,
)
from pipeline.errors import NoRoomError, WorkerError
from pipeline.events import EventKind, OnEvent
from pmet.errors import InputError, NumericalError

_TICK_S = 0.1
# A free cluster needs less time than this to make room.
_SILENCE_S = 5.0
# When a rank is lost, its peers soon fail with a broken connection. Waiting this long for all
# errors lets the message name the rank that failed first.
_GRACE_S = 1.0
# glibc's malloc raises the size limit above which blocks are returned to the system at once (up to
# 32 MiB) each time such a block is freed. Weights are gathered and freed all the time, and the
# freed memory, some hundred MiB, would stay with the rank.
_MEMORY_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
_PLAIN = (InputError, NumericalError)
_ECHO = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe", re.IGNORECASE)


class Rendezvous(NamedTuple):
    """A rank's number, and where the ranks meet.

    Attributes:
        rank: 0 to ``world_size - 1``.
        world_size: number of ranks.
        master_addr: address of rank 0's machine.
        master_port: a port that was free there.
    """

    rank: int
    world_size: int
    master_addr: str
    master_port: int


class RankGroup:
    """A group of ranks; use it as a context manager.

    Each rank holds ``factory(rendezvous, *init_args)``, created in its own process, all at the same
    time, so the factory may wait for the other ranks.

    Args:
        factory: class of the object that a rank holds.
        ranks: number of ranks.
        init_args: further arguments of the factory.
        num_cpus: logical CPUs of one rank.
        num_gpus: GPUs of one rank.
        threads: threads of the numerical libraries in each rank; Ray's choice if None.
        deadline_s: default time limit of a call in seconds; no limit if None.
        start_timeout_s: seconds until the cluster has room for all ranks, and again until all have
            started.
        on_event: called if the ranks wait for room.
        wait: wait until all have started; otherwise they start in the background, and the first
            call waits for them, and raises any error of the start.

    Raises:
        InputError, NumericalError: as raised by a rank's factory.
        WorkerError: the cluster has no room, or a rank cannot start.
        ValueError: fewer than one rank.
    """

    def __init__(
        self,
        factory: type,
        *,
        ranks: int,
        init_args: tuple[Any, ...] = (),
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        threads: int | None = None,
        deadline_s: float | None = None,
        start_timeout_s: float = 900.0,
        on_event: OnEvent | None = None,
        wait: bool = True,
    ) -> None:
        if ranks < 1:
            raise ValueError(f"a group of {ranks} ranks cannot be made; at least 1 is needed")
        self._deadline_s, self._start_timeout_s = deadline_s, start_timeout_s
        self._on_event = on_event
        self._needs = f"{ranks} ranks of {num_cpus:g} CPU and {num_gpus:g} GPU"
        self._actors: list[Any] = []
        self._placement: Any = None
        self._starting: list[Any] = []
        try:
            self._placement = _placement(ranks, num_cpus, num_gpus)
            environment = worker_environment(threads=threads) | _MEMORY_RETURNED
            self._actors = self._make_actors(ranks, num_cpus, num_gpus, environment)
            self._begin(factory, init_args, threads)
            if wait:
                self._finish_start()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Number of ranks; 0 once the group is closed."""
        return len(self._actors)

    def call_all(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """Call a method with the same arguments on every rank at once; see `call_each`."""
        return self.call_each(method, [args] * self.size, deadline_s=deadline_s)

    def call_each(
        self,
        method: str,
        args_by_rank: Sequence[tuple[Any, ...]],
        *,
        deadline_s: float | None = None,
    ) -> list[Any]:
        """Call a method on every rank at once, each with its own arguments.

        Args:
            method: name of a method of the object that the ranks hold.
            args_by_rank: positional arguments, one tuple per rank.
            deadline_s: time limit of the call in seconds; None uses the group's.

        Returns:
            The ranks' results, in rank order.

        Raises:
            InputError, NumericalError: as raised by a rank; another group would only meet it again.
                The group is closed.
            WorkerError: a rank failed or died, or the deadline passed, and the group was closed;
                or it was closed before.
            ValueError: the number of tuples is not the number of ranks.
        """
        if not self._actors:
            raise WorkerError("this group of ranks is closed; make a new one")
        if len(args_by_rank) != self.size:
            raise ValueError(f"{len(args_by_rank)} tuples of arguments for {self.size} ranks")
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        try:
            self._finish_start()
            replies = [
                actor.call.remote(method, tuple(args))
                for actor, args in zip(self._actors, args_by_rank, strict=True)
            ]
            return self._collect(replies, deadline_s, method)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all ranks, even busy ones, and free their resources; a second call does nothing."""
        actors, self._actors = self._actors, []
        placement, self._placement = self._placement, None
        if not ray.is_initialized():
            return
        for actor in actors:
            ray.kill(actor, no_restart=True)
        if placement is not None:
            remove_placement_group(placement)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_actors(
        self, ranks: int, num_cpus: float, num_gpus: float, environment: dict[str, str]
    ) -> list[Any]:
        actor_class = ray.remote(_RankProcess)
        return [
            actor_class.options(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._placement, placement_group_bundle_index=rank
                ),
            ).remote()
            for rank in range(ranks)
        ]

    def _begin(self, factory: type, init_args: tuple[Any, ...], threads: int | None) -> None:
        """Start all ranks as soon as there is room for them, without waiting."""
        address = self._actors[0].claim.remote()
        self._starting = [address] + [
            actor.start.remote(factory, rank, self.size, address, init_args, threads)
            for rank, actor in enumerate(self._actors)
        ]

    def _finish_start(self) -> None:
        """Wait until all ranks have started."""
        if not self._starting:
            return
        self._wait_for_room()
        end = time.monotonic() + self._start_timeout_s
        address, *made = self._starting
        self._collect([address], self._start_timeout_s, "start")
        self._collect(made, max(end - time.monotonic(), 0.0), "start")
        self._starting = []

    def _wait_for_room(self) -> None:
        begun, said = time.monotonic(), False
        # In short waits: Ray does not react to interrupts while it waits for a placement.
        while not self._placement.wait(min(1.0, self._start_timeout_s)):
            waited_s = time.monotonic() - begun
            if not said and waited_s > _SILENCE_S:
                said = True
                self._say_waiting()
            if waited_s < self._start_timeout_s:
                continue
            cpus, gpus = cluster_resources()
            raise NoRoomError(
                f"no room for {self._needs} within {self._start_timeout_s:g} s; the cluster has "
                f"{cpus:g} CPU and {gpus:g} GPU in all; ask for fewer ranks, or free the cluster"
            )

    def _say_waiting(self) -> None:
        if self._on_event is not None:
            text = f"no room yet for {self._needs} each, {free_text()}"
            self._on_event(
                EventKind.WAITING, f"{text}; waiting {self._start_timeout_s:g} s at most"
            )

    def _collect(self, replies: list[Any], deadline_s: float | None, doing: str) -> list[Any]:
        end = None if deadline_s is None else time.monotonic() + deadline_s
        results = [None] * len(replies)
        waiting = {reply: rank for rank, reply in enumerate(replies)}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_TICK_S)
            for reply in ready:
                rank = waiting.pop(reply)
                try:
                    results[rank] = ray.get(reply)
                except ray_exceptions.RayError as error:
                    self._blame([(rank, error), *_later_errors(waiting)], doing)
            if waiting and end is not None and time.monotonic() > end:
                late = ", ".join(str(rank) for rank in sorted(waiting.values()))
                raise WorkerError(
                    f"{doing} was not finished within {deadline_s:g} s; "
                    f"still waiting for rank {late} of {self.size}"
                )
        return results

    def _blame(self, errors: list[tuple[int, ray_exceptions.RayError]], doing: str) -> NoReturn:
        rank, error = min(errors, key=lambda item: _guilt(item[1]))
        if isinstance(error, ray_exceptions.RayTaskError):
            cause = original(error)
            if isinstance(cause, _PLAIN):
                raise cause from None
        failure = root_cause(error)
        raise WorkerError(
            f"rank {rank} of {self.size} failed in {doing}: {failure}",
            cause_text=full_text(error),
            kind=failure.kind,
        )


class _RankProcess(HeldInActor):
    """The object in a rank's process: it wraps the factory's object in a few calls."""

    def claim(self) -> tuple[str, int]:
        """This machine's address, and a free port on it."""
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(
        self,
        factory: type,
        rank: int,
        ranks: int,
        address: tuple[str, int],
        init_args: tuple[Any, ...],
        threads: int | None,
    ) -> None:
        """Create the object that this rank holds; ``address`` is the one that rank 0 claimed."""
        self._hold(factory, (Rendezvous(rank, ranks, *address), *init_args), threads)


def _placement(ranks: int, num_cpus: float, num_gpus: float) -> Any:
    """Reserve resources for all ranks together: ranks that held GPUs while waiting for their peers
    would block each other."""
    bundle = {"CPU": num_cpus, "GPU": num_gpus}
    bundle = {name: amount for name, amount in bundle.items() if amount > 0}
    return placement_group([bundle] * ranks, strategy="PACK")


def _later_errors(waiting: dict[Any, int]) -> list[tuple[int, ray_exceptions.RayError]]:
    """The errors of other ranks that arrive shortly after, in no particular order."""
    ready, _ = (
        ray.wait(list(waiting), num_returns=len(waiting), timeout=_GRACE_S) if waiting else ([], [])
    )
    errors = []
    for reply in ready:
        try:
            ray.get(reply)
        except ray_exceptions.RayError as error:
            errors.append((waiting[reply], error))
    return errors


def _guilt(error: ray_exceptions.RayError) -> int:
    """0 for the death of a process, 1 for an error of its own, 2 for a peer's broken connection."""
    if not isinstance(error, ray_exceptions.RayTaskError):
        return 0
    cause = original(error)
    return 1 if isinstance(cause, _PLAIN) or not _ECHO.search(f"{cause!r}") else 2
