"""The run folder: what a run has done, in a form that outlives it.

Finished work is an immutable file plus a small record that names it, written after it
(``records/``). Every attempt writes files of its own; only ``model/`` has names that are given.
Work without a record, or with the record of another job, does not count.
``run.json`` tells people and programs where the run is.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

from pipeline.errors import OtherJobError, RunFolderError, StorageError
from pipeline.events import EventKind
from pipeline.run_folder.lease import FOLDER as LEASE
from pipeline.run_folder.ownership import (
    MODEL,
    PUBLISHED,
    PUBLISHING,
    STATUS,
    files_made,
    is_run_record,
    is_unfinished,
    made,
    published_files,
    refuse_foreign_in_model,
)
from pipeline.storage import Store, digest_of, now_text

SUBMISSION = "PMET_SUBMISSION"
"""Environment variable in which whoever submits a run to a cluster names it."""
_PROGRESS_EVERY_S = 5.0
_ATTEMPTS_KEPT = 20
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
        self._written = 0.0

    def begin(self, digests: Mapping[str, str], *, seed: int, fresh: bool = False) -> bool:
        """Take the folder for a job; returns whether earlier work of the same job is in it.

        Args:
            digests: what the job's result depends on, by name.
            seed: recorded.
            fresh: delete what earlier runs made here; files that they did not make stay.

        Raises:
            RunFolderError: the folder holds the work of another job, no run, or files in
                ``model/`` that no run wrote.
        """
        self._digest = digest_of(dict(digests))
        earlier = self._earlier(digests, fresh=fresh)
        if fresh or not self.store.exists(f"records/{PUBLISHED}.json"):
            refuse_foreign_in_model(self.store)
        if fresh:
            self.check()
            # The status stays until it is overwritten: it shows whose folder this is.
            self.store.delete_files(name for name in files_made(self.store) if name != STATUS)
        self._clear_unfinished()
        self.status = {
            "status": "running",
            "started_at": now_text(),
            "finished_at": None,
            "attempt": (earlier or {}).get("attempt", 0) + 1,
            "earlier": _attempts(earlier)[-_ATTEMPTS_KEPT:] if earlier else [],
            "submission": os.environ.get(SUBMISSION),
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

    def _earlier(self, digests: Mapping[str, str], *, fresh: bool) -> dict[str, Any] | None:
        """What an earlier attempt at the same job said; None without one, or to start over."""
        if not self.store.exists(STATUS):
            return None
        earlier: dict[str, Any] = self.store.read_json(STATUS)
        if not is_run_record(earlier):
            raise RunFolderError(
                f"{self.store.join(STATUS)} was not written by a run of pmet; name another output"
            )
        if fresh:
            return None
        said = earlier["digests"]
        # A run whose requests could not be edited at all has recorded none.
        if changed := [name for name in digests if said and said.get(name) != digests[name]]:
            raise OtherJobError(self.store.url, dict.fromkeys(changed, ""))
        return earlier

    def _clear_unfinished(self) -> None:
        """Delete what was being written when an earlier attempt was killed."""
        if not self.store.is_local:
            return
        for file in self.store.list(unfinished=True):
            # Another run may be trying to take the lease just now.
            if is_unfinished(file) and not file.startswith(f"{LEASE}/"):
                self.store.delete(file)

    def write(self) -> None:
        """Write ``run.json``."""
        self.check()
        self.status["written_at"] = now_text()
        self.store.write_json(STATUS, self.status)
        self._written = time.monotonic()

    def finish(self, status: str, error: str | None = None, *, exit_status: int = 0) -> None:
        """Say how the run ended: complete, held, stopped or failed, and with which exit status."""
        self.status |= {
            "status": status,
            "finished_at": now_text(),
            "error": error,
            "exit_status": exit_status,
        }
        self.write()

    def progress(self, count: Mapping[str, Any]) -> None:
        """Say how far the stage is; written every five seconds at most.

        A storage that is out of reach just then does no harm: the next word comes soon.
        """
        self.status["progress"] = {**(self.status.get("progress") or {}), **count}
        if time.monotonic() - self._written > _PROGRESS_EVERY_S:
            with suppress(StorageError):
                self.write()

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Add an event to ``run.json`` and write it at once; see `pipeline.events.OnEvent`.

        What follows may be a long wait for another machine.
        """
        fields = {"kind": kind, "text": text, "shard": shard, "attempt": attempt}
        event = {name: value for name, value in fields.items() if value is not None}
        self.status["events"].append(event)
        with suppress(StorageError):
            self.write()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[dict[str, Any]]:
        """Time a stage; what the body puts into the yielded mapping is kept as its detail.

        Args:
            name: of the stage.
            total: items that it has to do; see `progress`.
        """
        detail: dict[str, Any] = {}
        # The detail of a stage that is under way is part of what it has to tell.
        progress = {"done": 0, "total": total, "rate": None, "detail": detail}
        self.status |= {"stage": name, "progress": progress}
        self.write()
        start = time.monotonic()
        yield detail
        seconds = round(time.monotonic() - start, 3)
        self.status["stages"].append({"name": name, "seconds": seconds, "detail": detail})
        self.status |= {"stage": None, "progress": None}
        self.write()

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Commit a piece of work: all its files are in place.

        Args:
            name: of the work.
            value: what is to be remembered, with ``file`` and its ``sha256`` or with ``files``,
                SHA-256 by name; their sizes are added.
        """
        sizes = {file: self.store.size(file) for file in _files(value)}
        self.check()
        self.store.write_json(
            f"records/{name}.json", {**value, "bytes": sizes, "digest": self._digest}
        )

    def forget(self, *names: str) -> None:
        """Delete the records of work that follows from work which is about to be done again."""
        self.check()
        for name in names:
            self.store.delete(f"records/{name}.json")

    def recorded(self, name: str) -> dict[str, Any] | None:
        """The record of a piece of this job's work; None where it is not finished.

        A record counts only while the files that it names are there, whole.
        """
        path = f"records/{name}.json"
        if not self.store.exists(path):
            return None
        record: dict[str, Any] = self.store.read_json(path)
        if record.get("digest") != self._digest:
            return None
        return record if self._whole(record) else None

    def sweep(self, folder: str, named: Collection[str]) -> None:
        """Delete what attempts that came to nothing have left in a folder.

        Args:
            folder: name in the run folder.
            named: the files that records name; they stay, as do files that no attempt wrote.
        """
        self.check()
        files = self.store.list(folder, unfinished=True)
        for file in (*made(files), *filter(is_unfinished, files)):
            if file not in named:
                self.store.delete(file)

    def clear_model(self, names: Collection[str]) -> None:
        """Make room for publishing: delete what it left before, and record what it will write.

        Args:
            names: of the files in ``model/`` that are about to be written.

        Raises:
            RunFolderError: ``model/`` holds files that no run wrote.
        """
        refuse_foreign_in_model(self.store)
        earlier = published_files(self.store)
        self.record(PUBLISHING, {"names": sorted(earlier | {f"{MODEL}/{n}" for n in names})})
        self.forget(PUBLISHED)
        self.store.delete_files(name for name in self.store.list(MODEL) if name in earlier)

    def _whole(self, record: Mapping[str, Any]) -> bool:
        sizes = record.get("bytes", {})
        return all(
            self.store.exists(file)
            and self.store.size(file) == sizes.get(file)
            and self.store.sha256(file) == digest
            for file, digest in _files(record).items()
        )


def _files(record: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by name of the files that a record names."""
    files: dict[str, str] = dict(record.get("files", {}))
    if "file" in record:
        files[record["file"]] = record["sha256"]
    return files


def _attempts(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The attempts that a ``run.json`` tells of, in short: how they ended, and what they took."""
    kept = ("attempt", "status", "started_at", "finished_at", "written_at", "stages", "error")
    last = {name: status.get(name) for name in kept}
    if last["status"] == "running":
        # Nobody has said how it ended.
        last["status"] = "killed"
    last["events"] = dict(Counter(event["kind"] for event in status.get("events", [])))
    return [*status.get("earlier", []), last]


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("pmet-pipeline", *_LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
