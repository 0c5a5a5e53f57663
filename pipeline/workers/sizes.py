"""The numbers of workers and ranks of a job, and how many fit, without asking a cluster."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.plan import Plan

WORTH_A_GPU = 2 << 30
"""Bytes of stored weights that justify a rank on a GPU."""
_WORTH_A_RANK = 128 << 20  # the same on CPUs
_MOST_CPU_RANKS = 4
_WORTH_STARTING = 128 << 30
"""Bytes of stored weights times facts that justify starting ranks: less is updated sooner than they
have imported their libraries, which takes each seven seconds of a core."""


def local_sizes(plan: Plan) -> tuple[int, int, int]:
    """Workers, ranks, and threads per process for a run on this machine's CPUs."""
    targets, update, cores = plan.job.targets, plan.job.update, os.cpu_count() or 1
    # One thread unless set otherwise: the number of threads decides how sums are split, and a
    # default that follows the machine would let the machine decide the last bits.
    threads = 1 if targets.threads_per_worker == "auto" else targets.threads_per_worker
    if targets.workers == 0:
        return 1, 1, threads
    workers = max(1, cores // threads) if targets.workers == "auto" else targets.workers
    most = min(cores, _MOST_CPU_RANKS)
    ranks = min(most, worth(plan, _WORTH_A_RANK)) if update.ranks == "auto" else update.ranks
    return workers, ranks, threads


def local_cpus(plan: Plan) -> int:
    """Logical CPUs of a cluster started here: enough for all that a run asks for, so that a small
    machine runs the same as a large one, and ranks need not wait for workers.
    """
    workers, ranks, threads = local_sizes(plan)
    return workers * threads + ranks


def worth(plan: Plan, each: int) -> int:
    """The number of ranks that a model justifies at ``each`` bytes of stored weights per rank.

    A rank takes seconds to start, and all of them communicate at every layer.
    """
    return -(-stored_bytes(plan) // each)


def updated_soon(plan: Plan) -> bool:
    """Whether a rank in this process has finished a job's update before others would have started.

    Only where the job leaves their number open, on CPUs, and for a model of at most 2 GiB.
    """
    update = plan.job.update
    if update.ranks != "auto" or update.gpus_per_rank:
        return False
    size = stored_bytes(plan)
    return size <= WORTH_A_GPU and len(plan.table.requests) * size <= _WORTH_STARTING


def stored_bytes(plan: Plan) -> int:
    """The size of the model's weights as stored in the checkpoint, in bytes."""
    return sum(tensor.size for tensor in plan.checkpoint.tensors.values())
