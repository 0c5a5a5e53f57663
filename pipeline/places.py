"""The locations that a job reads and writes, which may not overlap.

A run overwrites and deletes files in its output, so none of its inputs may be there, and nothing
that it shares with other runs may be written into the base model's folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pipeline.errors import RequestTableError
from pipeline.harness import is_path
from pipeline.job import JobConfig, is_hparams_file
from pipeline.models import is_gguf, is_hub_id
from pipeline.second_moments import is_file_name
from pipeline.storage import (
    Location,
    Store,
    expand,
    locate,
    locate_pattern,
    refuse_inside,
    refuse_overlap,
)


def refuse_overlaps(job: JobConfig, beside: Collection[str] = ()) -> None:
    """Refuse a job whose output overlaps with its inputs, or that writes into its model.

    Args:
        job: the job.
        beside: names in the output that the caller wrote for this run; they may be read.

    Raises:
        JobError: with one line for each overlap.
        StorageError: a path cannot be resolved.
    """
    vouched = [place for name in beside for place in locate(Store(job.output).join(name))]
    read = [
        (key, [p for p in places if not any(own.holds(p) for own in vouched)])
        for key, places in places_read(job).items()
    ]
    refuse_overlap(("output", job.output), read)
    refuse_inside(_written(job), "model", model_places(job.model))


def places_read(job: JobConfig) -> dict[str, list[Location]]:
    """The locations of everything that a job reads, stores included, by the key that names it."""
    places = {"model": model_places(job.model)}
    for key, patterns in (("requests", job.requests), ("corpus", job.corpus or ())):
        places[key] = pattern_places(patterns)
    places["hparams"] = hparams_places(job.hparams)
    single = {
        "context_templates": job.context_templates,
        "evaluate.questions": job.evaluate.questions,
        "second_moments": job.second_moments,
        "targets.store": job.targets.store,
        "evaluate.store": job.evaluate.store,
        "evaluate.last": job.evaluate.last,
    }
    harness = [task for task in job.evaluate.harness.tasks if is_path(task)]
    places["evaluate.harness"] = [place for task in harness for place in locate(task)]
    return places | {key: locate(url) for key, url in single.items() if url is not None}


def model_places(model: str) -> list[Location]:
    """A model's folder and the files that links in it point to, or its GGUF file.

    Empty for a hub model.
    """
    if is_hub_id(model):
        return []
    places = locate(model)
    if is_gguf(model):
        return places
    store = Store(model) if "::" not in model else None
    if store is not None and store.is_local:
        links = [name for name in store.entries() if store.is_link(name)]
        places += [place for name in links for place in locate(store.join(name))]
    return places


def hparams_places(hparams: str | None) -> list[Location]:
    """The location of a hyper-parameter file; empty for a preset."""
    return locate(hparams) if hparams is not None and is_hparams_file(hparams) else []


def pattern_places(patterns: Sequence[str]) -> list[Location]:
    """The files that paths, globs and folders match, and those folders."""
    return [place for p in patterns for place in locate_pattern(p, _matches(p))]


def _matches(pattern: str) -> list[str]:
    try:
        return expand(pattern)
    except RequestTableError:
        # The code that reads the files reports that there are none.
        return []


def _written(job: JobConfig) -> Iterator[tuple[str, str]]:
    """Folders outside the run folder that a job writes into, by the key that names them."""
    moments = job.second_moments
    folders = {
        "second_moments": None if moments is None or is_file_name(moments) else moments,
        "targets.store": job.targets.store,
        "evaluate.store": job.evaluate.store,
        "tracking.tensorboard": job.tracking.tensorboard,
        "tracking.mlflow": _without_server(job.tracking.mlflow),
    }
    return ((key, url) for key, url in folders.items() if url is not None)


def _without_server(url: str | None) -> str | None:
    """A tracking address that is a local folder; None for any other."""
    return None if url is None or ("://" in url and not url.startswith("file:")) else url
