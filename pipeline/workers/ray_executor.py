"""The executor on Ray: its session, its pool of workers, and its group of ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.cluster import (
    RankGroup,
    WorkerPool,
    cpus_free,
    default_workers,
    deferred,
    ranks_of,
    ray_session,
    room_for_workers,
    wait_for_nodes,
    workers_of,
)
from pipeline.events import EventKind, OnEvent
from pipeline.plan import Plan
from pipeline.workers.executor import Executor, Ranks
from pipeline.workers.kept_workers import KeptWorkers
from pipeline.workers.serial_executor import SerialRank
from pipeline.workers.sizes import WORTH_A_GPU, local_cpus, local_sizes, updated_soon, worth
from pipeline.workers.worker import ModelWorker


class RayExecutor(Executor):
    """The workers and ranks of one run on Ray; use it as a context manager.

    Ray and the pool are started when first needed: a run that finds all its work done starts
    nothing. The pool is released when others need its GPUs. Ranks take a while to start: if they
    have CPUs of their own, they do so while the workers finish their last shards. A small update
    on this machine's CPUs is done by a rank in this process.

    Args:
        plan: the run's plan.
        address: Ray cluster to run on; None starts one on this machine.
        on_event: called with retries and deaths.
        kept: takes the workers from there, and leaves them there at the end of the run.

    Attributes:
        threads: threads of each worker and rank.
    """

    def __init__(
        self,
        plan: Plan,
        address: str | None,
        on_event: OnEvent,
        kept: KeptWorkers | None = None,
    ) -> None:
        self._plan, self._address, self._on_event = plan, address, on_event
        self._kept = kept
        self._stack = ExitStack()
        self._pool: WorkerPool | None = None
        self._early: RankGroup | None = None
        self._size: tuple[int, int] | None = None
        # Whether to use as many workers as the cluster can hold, including after it grows.
        self._elastic = False
        self._leaving: Future[None] | None = None
        self.threads = local_sizes(plan)[2]

    def __exit__(self, *exception: object) -> None:
        with deferred():
            if self._leaving is None:
                self._leave()
            else:
                self._leaving.result()

    def dismiss(self) -> None:
        """End workers and ranks, and leave the cluster, in the background.

        No tasks can be run afterwards; the end of the ``with`` block waits for it.
        """
        assert self._leaving is None, "the executor has been dismissed"
        thread = ThreadPoolExecutor(1, "dismissal")
        self._leaving = thread.submit(self._leave)
        thread.shutdown(wait=False)

    def _leave(self) -> None:
        self._dismiss_ranks()
        if self._kept is None:
            self.release()
        self._stack.close()

    @property
    def ranks(self) -> int:
        """The number of processes in the update group."""
        return self._sized()[1]

    def check_ranks(self) -> None:
        """Wait for the nodes that the ranks need, before anything else is computed.

        Raises:
            NoRoomError: the cluster did not grow large enough in time.
        """
        ranks = self._sized()[1]
        wait_for_nodes(replace(ranks_of(self._plan.job), count=ranks), self._say_waiting)

    def _say_waiting(self, text: str) -> None:
        self._on_event(EventKind.WAITING, text)

    def expect_ranks(self, factory: type, init_args: tuple[Any, ...]) -> None:
        """Start the ranks now if their place is free; ``take_ranks`` waits for them."""
        if self._early is not None or self._plan.job.update.gpus_per_rank or self._rank_here:
            return
        # Workers still to start go first: ranks in their place would wait for them.
        awaited = self._started_pool().absent * self.threads
        if cpus_free() >= self.ranks + awaited:
            self._early = self._new_ranks(factory, init_args, wait=False)

    def take_ranks(self, factory: type, init_args: tuple[Any, ...]) -> Ranks:
        """Return the ranks, which the caller closes: the expected ones, or new ones.

        Workers end if the ranks need their resources: GPUs, or the last free CPUs. A cluster that
        has lost a machine may have room for either, though it had room for both.

        Raises:
            InputError, NumericalError, WorkerError: as for `RankGroup`.
        """
        if self._early is not None:
            group, self._early = self._early, None
            return group
        if self._rank_here:
            return SerialRank(factory, init_args, self.threads)
        update = self._plan.job.update
        if self._pool is not None and (update.gpus_per_rank or cpus_free() < self.ranks):
            self.release()
        return self._new_ranks(factory, init_args, wait=True)

    @property
    def _rank_here(self) -> bool:
        """Whether the model is updated by a rank in this process."""
        # On a cluster, this process may be on the smallest machine.
        here = self._address is None or self._kept is not None
        return here and updated_soon(self._plan)

    def _new_ranks(self, factory: type, init_args: tuple[Any, ...], *, wait: bool) -> RankGroup:
        return RankGroup(
            factory,
            ranks=self.ranks,
            init_args=init_args,
            num_gpus=self._plan.job.update.gpus_per_rank,
            threads=self.threads,
            on_event=self._on_event,
            wait=wait,
        )

    def _dismiss_ranks(self) -> None:
        if self._early is not None:
            self._early.close()
            self._early = None

    def _on_pool_event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        if kind in (EventKind.DEATH, EventKind.START_FAILURE):
            # The replacement of the lost worker may need their place.
            self._dismiss_ranks()
        self._on_event(kind, text, shard=shard, attempt=attempt)

    def release(self) -> None:
        """End the workers; the next stage that needs them starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _sized(self) -> tuple[int, int]:
        """The numbers of workers and ranks; joins the cluster, because ``auto`` needs its size."""
        if self._size is None:
            targets, update = self._plan.job.targets, self._plan.job.update
            workers, ranks, _ = local_sizes(self._plan)
            session = ray_session(
                self._address,
                num_cpus=local_cpus(self._plan),
                say=partial(self._on_event, EventKind.NOTE),
            )
            own = self._stack.enter_context(session)
            self._elastic = targets.workers == "auto" and (not own or targets.gpus_per_worker > 0)
            wanted = workers_of(self._plan.job)
            if wanted.count and not room_for_workers(wanted.gpus, cpus_per_worker=wanted.cpus):
                wait_for_nodes(wanted, self._say_waiting)
            if self._elastic:
                workers = default_workers(targets.gpus_per_worker, cpus_per_worker=self.threads)
            if self._rank_here:
                ranks = 1
            if update.ranks == "auto" and update.gpus_per_rank:
                ranks = min(default_workers(1), worth(self._plan, WORTH_A_GPU))
            self._size = (workers, ranks)
        return self._size

    def _room(self) -> int:
        """The number of workers that the cluster can hold now."""
        targets = self._plan.job.targets
        found = room_for_workers(targets.gpus_per_worker, cpus_per_worker=self.threads)
        return min(found, len(self._plan.target_shards))

    def _started_pool(self) -> WorkerPool:
        if self._pool is None:
            self._pool = self._new_pool() if self._kept is None else self._pool_of(self._kept)
        return self._pool

    def _pool_of(self, kept: KeptWorkers) -> WorkerPool:
        """The pool that is kept from run to run."""
        targets = self._plan.job.targets
        size = (self._sized()[0], self.threads, targets.gpus_per_worker, targets.timeout)
        return kept.take(
            (self._plan.base, *size), self._new_pool, self._on_pool_event, self._grown()
        )

    def _grown(self) -> Callable[[], int] | None:
        return self._room if self._elastic else None

    def _new_pool(self) -> WorkerPool:
        count = self._sized()[0]
        if self._kept is None:
            count = min(count, len(self._plan.target_shards))
        return WorkerPool(
            ModelWorker,
            count=count,
            grown=self._grown(),
            init_args=(self._plan.base,),
            num_cpus=self.threads,
            num_gpus=self._plan.job.targets.gpus_per_worker,
            threads=self.threads,
            task_timeout_s=self._plan.job.targets.timeout,
            on_event=self._on_pool_event,
        )
