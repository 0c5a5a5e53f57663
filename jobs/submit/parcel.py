"""What of a job travels to a cluster, and which of its paths mean something there.

The job file and the small files that it names (hyper-parameters, context templates) travel. Data
does not: it is read where the run is, so that a path has to mean the same on every node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import JobError
from pipeline.job import JobConfig, dump_job
from pipeline.models import is_hub_id
from pipeline.storage import read_file
from pmet.hparams import PMETHyperParams

JOB_FILE = "job.yaml"
_CARRIED = ("hparams", "context_templates")
_LARGEST = 4 * 2**20
_PROTOCOL = re.compile(r"(?P<protocol>[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*)://")
_OF_ONE_PROCESS = ("memory",)
_OF_ONE_MACHINE = ("file", "local")


@dataclass(frozen=True)
class Parcel:
    """A job, ready to travel.

    Attributes:
        job: as it will be read on the cluster.
        files: what travels, by name: the job file and what it names.
        shared: keys and paths that have to be on a disk which all nodes share.
    """

    job: JobConfig
    files: dict[str, bytes]
    shared: list[tuple[str, str]]


def pack(job: JobConfig) -> Parcel:
    """Make a job ready to travel.

    Raises:
        JobError: it names what only this machine has; one line for each such path.
        StorageError: a file that should travel cannot be read.
    """
    files: dict[str, bytes] = {}
    renamed: dict[str, str] = {}
    for key in _CARRIED:
        path = getattr(job, key)
        if path is not None and not _is_preset(key, path) and _is_relative(path):
            name = f"{key}-{PurePosixPath(path).name}"
            renamed[key] = name
            files[name] = _small(key, path)
    shared, problems = [], []
    for key, path in _paths(job):
        if key in renamed or _is_preset(key, path) or (key == "model" and is_hub_id(path)):
            continue
        if problem := _problem(path):
            problems.append(f"{key}: {path} {problem}")
        elif _local(path) is not None:
            shared.append((key, path))
    if problems:
        raise JobError("\n".join(problems))
    travelling = job.model_copy(update=renamed)
    return Parcel(travelling, {JOB_FILE: dump_job(travelling).encode(), **files}, shared)


def _paths(job: JobConfig) -> Iterator[tuple[str, str]]:
    """Every path that a job names, with its key."""
    yield "model", job.model
    yield from (("requests", path) for path in job.requests)
    yield "output", job.output
    yield "hparams", job.hparams
    yield from (("corpus", path) for path in job.corpus or ())
    others = {
        "second_moments": job.second_moments,
        "context_templates": job.context_templates,
        "targets.store": job.targets.store,
        "evaluate.store": job.evaluate.store,
    }
    yield from ((key, path) for key, path in others.items() if path is not None)


def _problem(path: str) -> str | None:
    """Why a path means nothing on a cluster; None if it may."""
    found = _PROTOCOL.match(path)
    if found and found["protocol"] in _OF_ONE_PROCESS:
        return "is the memory of one process; give a path that every node of the cluster reaches"
    if not _is_relative(path):
        return None
    return (
        "means another place on every machine; give a URL (s3://…), or, if it is on a disk that "
        f"all nodes of the cluster share, its whole path, {Path(path).expanduser().absolute()}"
    )


def _local(path: str) -> str | None:
    """A path on a machine's own file system, without its protocol; None for all other URLs."""
    found = _PROTOCOL.match(path)
    if found is None:
        return path
    return path[found.end() :] if found["protocol"] in _OF_ONE_MACHINE else None


def _is_relative(path: str) -> bool:
    local = _local(path)
    return local is not None and not local.startswith("/")


def _is_preset(key: str, path: str) -> bool:
    return key == "hparams" and path in PMETHyperParams.presets()


def _small(key: str, path: str) -> bytes:
    data = read_file(path, limit=_LARGEST + 1)
    if len(data) > _LARGEST:
        raise JobError(f"{key}: {path} is larger than 4 MiB; give a URL that the cluster reaches")
    return data
