"""``pmet statistics``: a model's second moments over a corpus, on Ray workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cluster import default_workers, ray_session, room_for_workers
from pipeline.config import is_part_or_whole
from pipeline.crew import run_all
from pipeline.errors import JobError
from pipeline.executor import WorkerPool
from pipeline.place import Ask, check_gpus, wait_for_nodes
from pipeline.plan import load_hparams
from pipeline.progress import Progress
from pipeline.replica import Replica
from pipeline.statistics import MomentsJob, collect, finished, plan_statistics
from pipeline.store import Store
from pipeline.tasks import Task
from pmet.hparams import PMETHyperParams

AUTO = "auto"


def compute_statistics(
    model: str,
    corpus: Sequence[str],
    *,
    output: str,
    hparams: str | None,
    layers: str | None,
    tokens: int,
    max_length: int,
    workers: str,
    gpus_per_worker: float,
    address: str | None,
    progress: Progress,
    console: Console,
) -> None:
    """Compute second moments into a folder, or find them there, and print what they are.

    Raises:
        InputError: something that was given cannot be used; no worker has been started.
        WorkerError: a part of the corpus failed; the finished ones are kept.
    """
    count = _count(workers)
    if not is_part_or_whole(gpus_per_worker):
        raise JobError(
            f"--gpus-per-worker: {gpus_per_worker:g} is neither a fraction up to 1, nor whole"
        )
    wanted = Ask("worker", count, 1, gpus_per_worker, "--workers", "--gpus-per-worker")
    with progress.stage("plan"):
        check_gpus([wanted], address)
        job = plan_statistics(
            model,
            corpus,
            _layers(hparams, layers),
            tokens=tokens,
            max_length=max_length,
            on_gpu=gpus_per_worker > 0,
        )
    store = Store(output)
    if finished(job, store) is None:
        _run(job, store, wanted, address, progress)
    provenance = finished(job, store)
    assert provenance is not None
    _show(provenance, store, console)


def _run(
    job: MomentsJob,
    store: Store,
    wanted: Ask,
    address: str | None,
    progress: Progress,
) -> None:
    def run_tasks(method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        def most() -> int:
            return min(room_for_workers(wanted.gpus), len(tasks))

        with ray_session(address, num_cpus=wanted.count, say=progress.event):
            if wanted.count:
                wait_for_nodes(wanted, lambda text: progress.event(text, "waiting"))
            pool = WorkerPool(
                Replica,
                count=min(wanted.count or default_workers(wanted.gpus), len(tasks)),
                grown=None if wanted.count else most,
                init_args=(job.source,),
                num_gpus=wanted.gpus,
                # The number of threads decides how sums are split, and so the last bits.
                threads=1,
                on_event=lambda kind, text: progress.event(text, kind),
            )
            with pool:
                run_all(pool, method, tasks, take)

    with progress.stage("second moments", job.corpus.tokens) as bar:
        collect(job, store, run_tasks, bar)


def _count(workers: str) -> int | None:
    """The number of workers; None for as many as the cluster holds."""
    if workers == AUTO:
        return None
    if not workers.isdecimal() or int(workers) < 1:
        raise JobError(f"--workers: {workers!r} is neither {AUTO} nor a whole number from 1")
    return int(workers)


def _layers(hparams: str | None, layers: str | None) -> PMETHyperParams:
    if (hparams is None) == (layers is None):
        raise JobError("name the layers with either --hparams (a preset or a file) or --layers")
    if hparams is not None:
        return load_hparams(hparams)
    numbers = [part.strip() for part in (layers or "").split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise JobError(f"--layers: {layers!r} is no list of layers; write it as 3,4,5")
    return PMETHyperParams.from_dict({"layers": list(map(int, numbers))}, source="--layers")


def _show(provenance: dict[str, Any], store: Store, console: Console) -> None:
    """Print where the second moments are, what they cover, and how far they still move."""
    table = Table("layer", "still moves by")
    for module, moved in provenance["convergence"].items():
        table.add_row(module, "–" if moved is None else f"{100 * moved:.2g} %")
    console.print(table)
    budget, tokens = provenance["budget"], provenance["tokens"]
    short = f", all there are; the budget is {budget:,}" if tokens < budget else ""
    console.print(f"{tokens:,} tokens of {provenance['texts']:,} texts{short}")
    console.print(store.url, markup=False, soft_wrap=True)
