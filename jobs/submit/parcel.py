"""Packs a job for a cluster and checks that its paths are valid there.

The job file and the small files that it names (hyper-parameters, context templates) are uploaded.
Data is not: it is read on the cluster, so a path must mean the same on every node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import JobError
from pipeline.harness import is_path
from pipeline.job import JobConfig, dump_job, is_hparams_file
from pipeline.models import is_hub_id
from pipeline.storage import read_file

JOB_FILE = "job.yaml"
_CARRIED = ("hparams", "context_templates")
_LARGEST = 4 * 2**20
_PROTOCOL = re.compile(r"(?P<protocol>[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*)://")
_OF_ONE_PROCESS = ("memory",)
_OF_ONE_MACHINE = ("file", "local")


@dataclass(frozen=True)
class Parcel:
    """A job packed for upload.

    Attributes:
        job: the job as it will be read on the cluster.
        files: content of the uploaded files by name: the job file and the files that it names.
        shared: keys and paths that must be on a disk that all nodes share.
    """

    job: JobConfig
    files: dict[str, bytes]
    shared: list[tuple[str, str]]


def pack(job: JobConfig) -> Parcel:
    """Pack a job for upload.

    Raises:
        JobError: it names paths that only this machine has; one line for each.
        StorageError: a file to upload cannot be read.
    """
    files: dict[str, bytes] = {}
    renamed: dict[str, str] = {}
    for key in _CARRIED:
        path = getattr(job, key)
        if path is not None and not _names_no_file(key, path) and _is_relative(path):
            name = f"{key}-{PurePosixPath(path).name}"
            renamed[key] = name
            files[name] = _small(key, path)
    shared, problems = [], []
    for key, path in _paths(job):
        if key in renamed or _names_no_file(key, path) or (key == "model" and is_hub_id(path)):
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
    """Yield every path that a job names, with its key."""
    yield "model", job.model
    yield from (("requests", path) for path in job.requests)
    yield "output", job.output
    yield from (("corpus", path) for path in job.corpus or ())
    others = {
        "hparams": job.hparams,
        "second_moments": job.second_moments,
        "context_templates": job.context_templates,
        "evaluate.questions": job.evaluate.questions,
        "targets.store": job.targets.store,
        "evaluate.store": job.evaluate.store,
    }
    yield from (("evaluate.harness", t) for t in job.evaluate.harness.tasks if is_path(t))
    yield from ((key, path) for key, path in others.items() if path is not None)


def _problem(path: str) -> str | None:
    """Return why a path is invalid on a cluster; None if it may be valid."""
    found = _PROTOCOL.match(path)
    if found and found["protocol"] in _OF_ONE_PROCESS:
        return "is the memory of one process; give a path that every node of the cluster reaches"
    if not _is_relative(path):
        return None
    return (
        "is relative, so it differs between machines; give a URL (s3://…), or, if it is on a disk "
        "that all nodes of the cluster share, its absolute path, "
        f"{Path(path).expanduser().absolute()}"
    )


def _local(path: str) -> str | None:
    """Return a local file system path without its protocol; None for other URLs."""
    found = _PROTOCOL.match(path)
    if found is None:
        return path
    return path[found.end() :] if found["protocol"] in _OF_ONE_MACHINE else None


def _is_relative(path: str) -> bool:
    local = _local(path)
    return local is not None and not local.startswith("/")


def _names_no_file(key: str, path: str) -> bool:
    return key == "hparams" and not is_hparams_file(path)


def _small(key: str, path: str) -> bytes:
    data = read_file(path, limit=_LARGEST + 1)
    if len(data) > _LARGEST:
        raise JobError(f"{key}: {path} is larger than 4 MiB; give a URL that the cluster can reach")
    return data
