"""``pmet statistics``: computes a model's second moments over a corpus, with or without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.arguments import whole_or_auto
from pipeline.cluster import Ask, Pool, SerialPool, Task, check_gpus, run_all
from pipeline.errors import JobError
from pipeline.events import EventKind, OnEvent, StageName
from pipeline.hyper_parameters import load_hparams
from pipeline.job import is_part_or_whole
from pipeline.models import ModelSource
from pipeline.places import model_places, pattern_places
from pipeline.progress import Progress
from pipeline.second_moments import (
    MomentsJob,
    checked_factor,
    collect,
    finished,
    plan_statistics,
)
from pipeline.storage import Store, refuse_overlap
from pipeline.workers import ModelWorker
from pmet.hparams import PMETHyperParams

THREADS = 1
"""Threads per worker: the number decides how sums are split, and so the last bits."""
_DIGITS = 9


def compute_statistics(
    model: str,
    corpus: Sequence[str],
    *,
    output: str,
    hparams: str | None,
    layers: str | None,
    tokens: str,
    max_length: int,
    workers: str,
    gpus_per_worker: float,
    address: str | None,
    progress: Progress,
    console: Console,
) -> None:
    """Compute second moments into a folder, unless it has them already, and print a summary.

    Raises:
        InputError: an argument cannot be used; no worker was started.
        WorkerError: a part of the corpus failed; finished parts are kept.
    """
    wanted = wanted_workers(workers, gpus_per_worker, address)
    read = [("model", model_places(model)), ("corpus", pattern_places(corpus))]
    refuse_overlap(("--output", output), read)
    with progress.stage(StageName.PLAN):
        check_gpus([wanted], address)
        job = plan_statistics(
            model,
            corpus,
            _layers(hparams, layers),
            tokens=whole_or_auto("--tokens", tokens, least=1, digits=_DIGITS + 3),
            max_length=max_length,
            on_gpu=gpus_per_worker > 0,
        )
    store = Store(output)
    if job.warning:
        progress.event(EventKind.WARNING, job.warning)
    if finished(job, store) is None:
        _run(job, store, wanted, address, progress)
    provenance = finished(job, store)
    assert provenance is not None
    _show(provenance, store, console)


def wanted_workers(workers: str, gpus_per_worker: float, address: str | None) -> Ask:
    """The workers that a command's options ask for.

    Raises:
        JobError: the options contradict each other, or one has an impossible value.
    """
    count = whole_or_auto("--workers", workers)
    if count == 0 and (gpus_per_worker or address is not None):
        raise JobError(
            "--workers 0 computes in this process, on the CPU; leave out --gpus-per-worker and "
            "--address, or give a number of workers"
        )
    if not is_part_or_whole(gpus_per_worker):
        raise JobError(
            f"--gpus-per-worker: {gpus_per_worker:g} is neither a fraction up to 1 nor a whole "
            "number"
        )
    return Ask("worker", count, 1, gpus_per_worker, "--workers", "--gpus-per-worker")


@contextmanager
def pool_of_workers(
    source: ModelSource, wanted: Ask, tasks: int, address: str | None, on_event: OnEvent
) -> Iterator[Pool]:
    """Start workers with a model each, in this process or on a Ray cluster.

    Args:
        source: the model.
        wanted: the workers.
        tasks: no more workers than these tasks are started.
        address: Ray cluster; None starts one on this machine.
        on_event: called with retries and deaths.
    """
    options: dict[str, Any] = {
        "init_args": (source,),
        "threads": THREADS,
        "on_event": on_event,
    }
    with (
        SerialPool(ModelWorker, **options)
        if wanted.count == 0
        else _ray_pool(wanted, tasks, address, options)
    ) as pool:
        yield pool


def _run(
    job: MomentsJob,
    store: Store,
    wanted: Ask,
    address: str | None,
    progress: Progress,
) -> None:
    def run_tasks(method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        with pool_of_workers(job.source, wanted, len(tasks), address, progress.event) as pool:
            run_all(pool, method, tasks, take)

    with progress.stage(StageName.SECOND_MOMENTS, job.corpus.tokens) as bar:
        collect(job, store, run_tasks, bar, partial(checked_factor, "this corpus"))


@contextmanager
def _ray_pool(
    wanted: Ask, tasks: int, address: str | None, options: dict[str, Any]
) -> Iterator[Pool]:
    """Start workers on a Ray cluster: as many as it has room for if no number is given."""
    from pipeline.cluster import (
        WorkerPool,
        default_workers,
        ray_session,
        room_for_workers,
        wait_for_nodes,
    )

    def most() -> int:
        return min(room_for_workers(wanted.gpus), tasks)

    on_event = options["on_event"]
    with ray_session(address, num_cpus=wanted.count, say=partial(on_event, EventKind.NOTE)):
        if wanted.count:
            wait_for_nodes(wanted, partial(on_event, EventKind.WAITING))
        with WorkerPool(
            ModelWorker,
            count=min(wanted.count or default_workers(wanted.gpus), tasks),
            grown=None if wanted.count else most,
            num_gpus=wanted.gpus,
            **options,
        ) as pool:
            yield pool


def _layers(hparams: str | None, layers: str | None) -> PMETHyperParams:
    if (hparams is None) == (layers is None):
        raise JobError("give the layers with either --hparams (a preset or a file) or --layers")
    if hparams is not None:
        return load_hparams(hparams)
    numbers = [part.strip() for part in (layers or "").split(",")]
    if not all(number.isdecimal() and len(number) <= _DIGITS for number in numbers):
        raise JobError(f"--layers: {layers!r} is not a list of layers; write it like 3,4,5")
    return PMETHyperParams.from_dict({"layers": list(map(int, numbers))}, source="--layers")


def _show(provenance: dict[str, Any], store: Store, console: Console) -> None:
    """Print where the second moments are, what they cover and how much they still change."""
    table = Table("layer", "still changes by")
    for module, moved in provenance["convergence"].items():
        table.add_row(module, "–" if moved is None else f"{100 * moved:.2g} %")
    console.print(table)
    budget, tokens = provenance["budget"], provenance["tokens"]
    short = f", the whole corpus; the budget is {budget:,}" if tokens < budget else ""
    console.print(f"{tokens:,} tokens of {provenance['texts']:,} texts{short}")
    console.print(store.url, markup=False, soft_wrap=True)
