"""What a job asks of the place where it runs, and whether this machine has the GPUs for it.

A job that runs on this machine and asks for more GPUs than there are is refused: none will be
added. What a cluster that is joined lacks may still come: `pipeline.cluster.nodes` waits for it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from pipeline.cluster.process import named_cluster
from pipeline.cluster.shares import fit_gpus
from pipeline.errors import JobError
from pipeline.job import EditSettings

# Threads for each core that are no cause for a warning.
_CROWD = 2


@dataclass(frozen=True)
class Ask:
    """Processes of one kind that a job asks for.

    Attributes:
        what: they are called: ``worker`` or ``rank``.
        count: how many; None where the run takes as many as there is room for.
        cpus: logical CPUs of each.
        gpus: GPUs of each, a fraction up to 1, or whole.
        count_key: setting that says how many.
        gpus_key: setting that says how many GPUs.
    """

    what: str
    count: int | None
    cpus: int
    gpus: float
    count_key: str
    gpus_key: str

    @property
    def least(self) -> int:
        """How many there have to be before work can begin: workers need not all be there."""
        return self.count or 1 if self.what == "rank" else 1

    def __str__(self) -> str:
        """``4 ranks of 1 CPU and 1 GPU each``, of as many as are needed to begin."""
        each = f"{self.cpus:g} CPU and {self.gpus:g} GPU"
        return (
            f"a {self.what} of {each}"
            if self.least == 1
            else f"{self.least} {self.what}s of {each} each"
        )


def asks(job: EditSettings) -> list[Ask]:
    """The workers and the ranks of a job."""
    return [workers_of(job), ranks_of(job)]


def workers_of(job: EditSettings) -> Ask:
    """The workers that compute a job's targets."""
    targets = job.targets
    count = None if targets.workers == "auto" else targets.workers
    threads = 1 if targets.threads_per_worker == "auto" else targets.threads_per_worker
    keys = ("targets.workers", "targets.gpus_per_worker")
    return Ask("worker", count, threads, targets.gpus_per_worker, *keys)


def ranks_of(job: EditSettings) -> Ask:
    """The ranks of a job's update."""
    update = job.update
    count = None if update.ranks == "auto" else update.ranks
    return Ask("rank", count, 1, update.gpus_per_rank, "update.ranks", "update.gpus_per_rank")


def runs_here(address: str | None) -> bool:
    """Whether a run given this address starts a Ray of its own on this machine."""
    ray = sys.modules.get("ray")
    joined = ray is not None and ray.is_initialized()
    return named_cluster(address) is None and not joined


def check_gpus(wanted: list[Ask], address: str | None) -> None:
    """Refuse what asks for more GPUs than this machine has, if it is to run here.

    Args:
        wanted: what is asked for.
        address: of the cluster to run on; None: as the environment says, or this machine.

    Raises:
        JobError: a line for each setting that cannot be met, with the GPUs that there are and what
            to set.
    """
    if not any(ask.gpus for ask in wanted) or not runs_here(address):
        return
    here, known = gpus_here()
    faults = [fault for ask in wanted if (fault := _fault(ask, here, known))]
    if faults:
        raise JobError("\n".join(faults))


def gpus_here() -> tuple[int, str]:
    """GPUs of this machine that both Ray and PyTorch see; and the number as a message has it.

    Devices that ``CUDA_VISIBLE_DEVICES`` hides do not count.
    """
    import torch

    from pipeline.cluster.ray_internals import gpus_seen

    by_ray, by_torch = gpus_seen(), torch.cuda.device_count()
    count = min(by_ray, by_torch)
    notes = []
    if by_ray != by_torch:
        notes.append(f"Ray sees {by_ray}, PyTorch {torch.__version__} sees {by_torch}")
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        notes.append(f"CUDA_VISIBLE_DEVICES is {hidden!r}")
    number = "no GPU" if not count else "1 GPU" if count == 1 else f"{count} GPUs"
    return count, f"{number} ({'; '.join(notes)})" if notes else number


def _fault(ask: Ask, here: int, known: str) -> str | None:
    """What is wrong with what is asked of so many GPUs, and what to do; None if nothing."""
    if not ask.gpus:
        return None
    fit = fit_gpus(ask.gpus, here)
    elsewhere = "run on a cluster that has more, with --address"
    if not here:
        elsewhere = "run on a machine or a cluster that has some (--address)"
    if not fit:
        lower = "0, to compute on CPUs" if not here else f"{here} at most"
        return (
            f"{ask.gpus_key}: {ask.gpus:g}, but this machine has {known}; set {ask.gpus_key} to "
            f"{lower}, or {elsewhere}"
        )
    if ask.count is None or ask.count <= fit:
        return None
    return (
        f"{ask.count_key}: {ask.count} of {ask.gpus:g} GPU each are more than the {fit} that this "
        f"machine holds, which has {known}; set {ask.count_key} to {fit} or to auto, or {elsewhere}"
    )


def crowding(job: EditSettings, address: str | None) -> list[str]:
    """Warnings about workers or ranks that are too many for this machine's cores, if it runs here.

    They are no error: what is computed does not depend on how many compute it.
    """
    if not runs_here(address):
        return []
    cores = os.cpu_count() or 1
    return [
        f"{ask.count_key}: {ask.count} {ask.what}s of {ask.cpus} CPU each share the {cores} of "
        "this machine; each takes memory of its own, and together they are no faster: set "
        f"{ask.count_key} to {max(1, cores // ask.cpus)}, or to auto"
        for ask in asks(job)
        if ask.count and not ask.gpus and ask.count * ask.cpus > _CROWD * cores
    ]
