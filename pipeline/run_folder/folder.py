"""The run folder: the results of a run's work, in a form that survives a crash.

Finished work is an immutable file plus a small record in ``records/`` that names it and is written
after it. Every attempt writes files under new names; only files in ``model/`` have fixed names.
Work without a record, or with a record of another job, does not count.
``run.json`` shows people and programs the run's progress.
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
"""Environment variable with the name under which a run was submitted to a cluster."""
_PROGRESS_EVERY_S = 5.0
_ATTEMPTS_KEPT = 20
_LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "fsspec", "safetensors")


class RunFolder:
    """One run's folder, its records and its status.

    Args:
        url: the folder.
        check: called before every write that counts; raises if another run has taken over the
            folder.

    Attributes:
        store: the folder's files.
        status: the contents of ``run.json``.
    """

    def __init__(self, url: str, check: Callable[[], None] = lambda: None) -> None:
        self.store = Store(url)
        self.check = check
        self.status: dict[str, Any] = {}
        self._digest = ""
        self._written = 0.0

    def begin(
        self,
        digests: Mapping[str, str],
        *,
        seed: int,
        fresh: bool = False,
        origins: Mapping[str, str] | None = None,
    ) -> bool:
        """Take the folder for a job; return whether it holds earlier work of the same job.

        Args:
            digests: the inputs that the job's result depends on, by name.
            seed: recorded.
            fresh: delete the files of earlier runs; all other files stay.
            origins: where inputs are from that the job does not name in full; recorded.

        Raises:
            RunFolderError: the folder holds the work of another job, no run, or files in ``model/``
                that no run wrote.
        """
        self._digest = digest_of(dict(digests))
        earlier = self._earlier(digests, fresh=fresh)
        if fresh or not self.store.exists(f"records/{PUBLISHED}.json"):
            refuse_foreign_in_model(self.store)
        if fresh:
            self.check()
            # The status stays until it is overwritten: it shows that the folder belongs to a run.
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
            "origins": dict(origins or {}),
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
        """The status of an earlier attempt at this job; None without one, or to start over."""
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
        # A run in which no request could be edited has recorded no digests.
        if changed := [name for name in digests if said and said.get(name) != digests[name]]:
            raise OtherJobError(self.store.url, dict.fromkeys(changed, ""))
        return earlier

    def _clear_unfinished(self) -> None:
        """Delete files that were being written when an earlier attempt was killed."""
        if not self.store.is_local:
            return
        for file in self.store.list(unfinished=True):
            # Another run may be trying to take the lease at this moment.
            if is_unfinished(file) and not file.startswith(f"{LEASE}/"):
                self.store.delete(file)

    def write(self) -> None:
        """Write ``run.json``."""
        self.check()
        self.status["written_at"] = now_text()
        self.store.write_json(STATUS, self.status)
        self._written = time.monotonic()

    def finish(self, status: str, error: str | None = None, *, exit_status: int = 0) -> None:
        """Record how the run ended: complete, held, stopped or failed, and its exit status."""
        self.status |= {
            "status": status,
            "finished_at": now_text(),
            "error": error,
            "exit_status": exit_status,
        }
        self.write()

    def progress(self, count: Mapping[str, Any]) -> None:
        """Record the progress of the stage; written at most every five seconds.

        A failed write does no harm: the next update follows soon.
        """
        self.status["progress"] = {**(self.status.get("progress") or {}), **count}
        if time.monotonic() - self._written > _PROGRESS_EVERY_S:
            with suppress(StorageError):
                self.write()

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Add an event to ``run.json`` and write it at once; see `pipeline.events.OnEvent`.

        The next step may be a long wait for another machine.
        """
        fields = {"kind": kind, "text": text, "shard": shard, "attempt": attempt}
        event = {name: value for name, value in fields.items() if value is not None}
        self.status["events"].append(event)
        with suppress(StorageError):
            self.write()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[dict[str, Any]]:
        """Time a stage; entries that the body puts into the yielded mapping are kept as its detail.

        Args:
            name: the stage's name.
            total: the number of items it has to process; see `progress`.
        """
        detail: dict[str, Any] = {}
        # The detail of a running stage is part of its progress.
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
        """Commit a piece of work whose files are all in place.

        Args:
            name: the name of the work.
            value: the record, with ``file`` and its ``sha256``, or with ``files``, SHA-256 by name;
                their sizes are added.
        """
        sizes = {file: self.store.size(file) for file in _files(value)}
        self.check()
        self.store.write_json(
            f"records/{name}.json", {**value, "bytes": sizes, "digest": self._digest}
        )

    def forget(self, *names: str) -> None:
        """Delete the records of work that depends on work about to be done again."""
        self.check()
        for name in names:
            self.store.delete(f"records/{name}.json")

    def recorded(self, name: str) -> dict[str, Any] | None:
        """The record of a piece of this job's work; None if it is not finished.

        A record counts only while the files it names exist undamaged.
        """
        path = f"records/{name}.json"
        if not self.store.exists(path):
            return None
        record: dict[str, Any] = self.store.read_json(path)
        if record.get("digest") != self._digest:
            return None
        return record if self._whole(record) else None

    def sweep(self, folder: str, named: Collection[str]) -> None:
        """Delete files left in a folder by attempts that never finished.

        Args:
            folder: name in the run folder.
            named: the files named in records, which stay, as do files that no attempt wrote.
        """
        self.check()
        files = self.store.list(folder, unfinished=True)
        for file in (*made(files), *filter(is_unfinished, files)):
            if file not in named:
                self.store.delete(file)

    def clear_model(self, names: Collection[str]) -> None:
        """Prepare to publish: delete the previously published files, and record the new ones.

        Args:
            names: names of the files about to be written to ``model/``.

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
    """A summary of the attempts in a ``run.json``: how they ended, and how long they took."""
    kept = ("attempt", "status", "started_at", "finished_at", "written_at", "stages", "error")
    last = {name: status.get(name) for name in kept}
    if last["status"] == "running":
        # The attempt's end was never recorded.
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
