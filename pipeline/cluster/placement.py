"""A job's requirements of processes and GPUs, and whether this machine has the GPUs.

A job that runs on this machine and asks for more GPUs than it has is refused: none will be added.
An existing cluster may still grow: `pipeline.cluster.nodes` waits for it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from pipeline.cluster.process import named_cluster
from pipeline.cluster.shares import fit_gpus
from pipeline.errors import JobError
from pipeline.job import EditSettings

# This many threads per core cause no warning.
_CROWD = 2


@dataclass(frozen=True)
class Ask:
    """The processes of one kind that a job asks for.

    Attributes:
        what: their name: ``worker`` or ``rank``.
        count: how many; None if the run uses as many as there is room for.
        cpus: logical CPUs of each.
        gpus: GPUs of each, a fraction up to 1, or whole.
        count_key: the setting for their number.
        gpus_key: the setting for their GPUs.
    """

    what: str
    count: int | None
    cpus: int
    gpus: float
    count_key: str
    gpus_key: str

    @property
    def least(self) -> int:
        """How many must exist before work can begin: not all workers are needed for that."""
        return self.count or 1 if self.what == "rank" else 1

    def __str__(self) -> str:
        """``4 ranks of 1 CPU and 1 GPU each``, for the number needed to begin."""
        each = f"{self.cpus:g} CPU and {self.gpus:g} GPU"
        return (
            f"a {self.what} of {each}"
            if self.least == 1
            else f"{self.least} {self.what}s of {each} each"
        )


def asks(job: EditSettings) -> list[Ask]:
    """The workers and ranks of a job."""
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
    """Refuse requirements for more GPUs than this machine has, if the job is to run here.

    Args:
        wanted: the requirements.
        address: address of the cluster to run on; None: as in the environment, else this machine.

    Raises:
        JobError: one line for each setting that cannot be met, with the available GPUs and the
            remedy.
    """
    if not any(ask.gpus for ask in wanted) or not runs_here(address):
        return
    here, known = gpus_here()
    faults = [fault for ask in wanted if (fault := _fault(ask, here, known))]
    if faults:
        raise JobError("\n".join(faults))


def gpus_here() -> tuple[int, str]:
    """GPUs of this machine that both Ray and PyTorch see; and that number as text for messages.

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
    """What is wrong with a requirement given these GPUs, and the remedy; None if nothing."""
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
        f"{ask.count_key}: {ask.count} of {ask.gpus:g} GPU each are more than the {fit} that fit "
        f"on this machine, which has {known}; set {ask.count_key} to {fit} or auto, or {elsewhere}"
    )


def crowding(job: EditSettings, address: str | None) -> list[str]:
    """Warnings if a job that runs here has too many workers or ranks for this machine's cores.

    They are not errors: the results do not depend on the number of processes.
    """
    if not runs_here(address):
        return []
    cores = os.cpu_count() or 1
    return [
        f"{ask.count_key}: {ask.count} {ask.what}s of {ask.cpus} CPU each share the {cores} of "
        "this machine; each needs its own memory, and together they are no faster: set "
        f"{ask.count_key} to {max(1, cores // ask.cpus)}, or to auto"
        for ask in asks(job)
        if ask.count and not ask.gpus and ask.count * ask.cpus > _CROWD * cores
    ]
