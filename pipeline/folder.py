"""The run folder: what a run has done, in a form that outlives it.

Finished work is an immutable file plus a small record that names it, written after it
(``records/``). Work without a record, or with the record of another job, does not count.
``run.json`` tells people and programs where the run is.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from pipeline.errors import RunFolderError
from pipeline.store import Store

STATUS = "run.json"
_OWN = (
    "context_templates.json",
    "delta",
    "job.yaml",
    "metrics.json",
    "model",
    "records",
    "rejected.parquet",
    "report.html",
    "results.parquet",
    "second_moments",
    "targets",
    STATUS,
)
_LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "fsspec", "safetensors")


class RunFolder:
    """One run's folder, its records and its status.

    Args:
        url: where it is.
        check: called before anything that counts is written; raises where another run has taken
            the folder over.

    Attributes:
        store: the folder's files.
        status: what ``run.json`` holds.
    """

    def __init__(self, url: str, check: Callable[[], None] = lambda: None) -> None:
        self.store = Store(url)
        self.check = check
        self.status: dict[str, Any] = {}
        self._digest = ""

    def begin(self, digests: Mapping[str, str], *, seed: int, fresh: bool = False) -> bool:
        """Take the folder for a job; returns whether earlier work of the same job is in it.

        Args:
            digests: what the job's result depends on, by name.
            seed: recorded.
            fresh: delete what an earlier run left.

        Raises:
            RunFolderError: the folder holds the work of another job.
        """
        self._digest = hashlib.sha256(
            json.dumps(dict(digests), sort_keys=True).encode()
        ).hexdigest()
        if fresh:
            self.check()
            for name in _OWN:
                self.store.delete(name)
        earlier = self.store.read_json(STATUS) if self.store.exists(STATUS) else None
        if earlier is not None:
            changed = [k for k in digests if earlier.get("digests", {}).get(k) != digests[k]]
            if changed:
                raise RunFolderError(
                    f"{self.store.url} holds a run of another job: {', '.join(changed)} changed; "
                    "name another output, or start over with --fresh"
                )
        self.status = {
            "status": "running",
            "started_at": _now(),
            "finished_at": None,
            "attempt": (earlier or {}).get("attempt", 0) + 1,
            "seed": seed,
            "digests": dict(digests),
            "digest": self._digest,
            "counts": {},
            "stages": [],
            "layers": [],
            "events": [],
            "versions": versions(),
            "machine": f"{platform.node()} {platform.machine()} {platform.system()}",
        }
        self.write()
        return earlier is not None

    def write(self) -> None:
        """Write ``run.json``."""
        self.check()
        self.store.write_json(STATUS, self.status)

    def finish(self, status: str, error: str | None = None) -> None:
        """Say how the run ended: complete, held or failed."""
        self.status |= {"status": status, "finished_at": _now(), "error": error}
        self.write()

    def event(self, kind: str, text: str) -> None:
        """Remember something that happened: a retry, a death."""
        self.status["events"].append({"kind": kind, "text": text})

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what the body puts into the yielded mapping is kept as its detail."""
        detail: dict[str, Any] = {}
        self.status["stage"] = name
        self.write()
        start = time.monotonic()
        yield detail
        seconds = round(time.monotonic() - start, 3)
        self.status["stages"].append({"name": name, "seconds": seconds, "detail": detail})
        self.status["stage"] = None
        self.write()

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Commit a piece of work: all its files are in place."""
        self.check()
        self.store.write_json(f"records/{name}.json", {**value, "digest": self._digest})

    def recorded(self, name: str) -> dict[str, Any] | None:
        """The record of a piece of this job's work; None where it is not finished.

        A record counts only while the file that it names is there, whole (``file``, ``sha256``).
        """
        path = f"records/{name}.json"
        if not self.store.exists(path):
            return None
        record: dict[str, Any] = self.store.read_json(path)
        if record.get("digest") != self._digest:
            return None
        file = record.get("file")
        if file is not None and (
            not self.store.exists(file) or self.store.sha256(file) != record["sha256"]
        ):
            return None
        return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("pmet-pipeline", *_LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
