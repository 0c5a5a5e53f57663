"""The store of schedules and their logs, which any number of runners may share.

    schedules/NAME.json                       a schedule
    nights/NAME/20261124T010000Z-01.json      record of the first attempt at that due time
    logs/NAME/20261124T010000Z-01.log         output of that attempt
    running/NAME.json                         the attempt that is running
    leases/NAME/                              the right to run the schedule

An attempt's record is created once and never changed. Only the holder of a schedule's lease writes
files under its name, except for the schedule file itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import ValidationError

from jobs.schedule.due import is_settled
from jobs.schedule.records import Night, Schedule
from pipeline.errors import FolderBusyError, ScheduleError
from pipeline.run_folder import Lease, leases
from pipeline.storage import Store

_ATTEMPT = re.compile(r"\d{8}T\d{6}Z-\d{2,}\.(json|log)")
_Record = TypeVar("_Record", Schedule, Night)


class Book:
    """The schedules of one store, and their logs.

    Every method raises ``StorageError`` if the store fails, and ``ScheduleError`` for an invalid
    file.
    """

    def __init__(self, url: str) -> None:
        """Open the store at ``url``, a path or any fsspec URL; it need not exist."""
        self._store = Store(url)

    @property
    def url(self) -> str:
        """Absolute path or URL of the store."""
        return self._store.url

    def names(self) -> list[str]:
        """Return the names of all schedules, sorted."""
        return [PurePosixPath(name).stem for name in self._store.glob("schedules/*.json")]

    def get(self, name: str) -> Schedule:
        """Return a schedule.

        Raises:
            ScheduleError: there is no schedule with this name.
        """
        names = self.names()
        if name not in names:
            there = f"there are {', '.join(names)}" if names else "there is none yet"
            raise ScheduleError(
                f"{self.url} has no schedule {name!r}; {there}. Add it with pmet schedule add, or "
                f"name another store with --store or PMET_SCHEDULES"
            )
        return self._read(_schedule(name), Schedule)

    def add(self, schedule: Schedule, *, replace: bool = False) -> None:
        """Add a schedule.

        Raises:
            ScheduleError: a schedule with this name exists and ``replace`` is false.
        """
        name = _schedule(schedule.name)
        if replace:
            self._store.write_bytes(name, schedule.to_json())
        elif not self._store.create_bytes(name, schedule.to_json()):
            raise ScheduleError(
                f"schedule {schedule.name!r} already exists; give --replace to change it, or "
                "choose another name"
            )

    def enable(self, name: str, enabled: bool, now: datetime) -> Schedule:
        """Enable or disable a schedule; runs missed while it is disabled are skipped."""
        schedule = self.get(name)
        if schedule.enabled != enabled:
            schedule = schedule.model_copy(update={"enabled": enabled, "since": now})
            self._store.write_bytes(_schedule(name), schedule.to_json())
        return schedule

    def remove(self, name: str, *, purge: bool = False) -> None:
        """Remove a schedule, and its log if ``purge`` is true.

        Raises:
            ScheduleError: there is no such schedule, or its log is being written.
        """
        # A schedule removed earlier may have left a log to delete.
        if not (purge and self._nights(name)):
            self.get(name)
        if not purge:
            self._store.delete(_schedule(name))
            return
        try:
            with self.lease(name):
                self._store.delete_files([*self._attempts(name), _schedule(name), _running(name)])
        except FolderBusyError:
            raise ScheduleError(
                f"schedule {name!r} is running and writing its log; stop its runner or wait, "
                "then remove it"
            ) from None
        folder = f"leases/{name}"
        held = leases(Store(self._store.join(folder)))
        self._store.delete_files(f"{folder}/{file}" for file in held)

    def _attempts(self, name: str) -> list[str]:
        """Return the record and log files of a schedule's attempts, and no other files."""
        names = (*self._store.list(f"nights/{name}"), *self._store.list(f"logs/{name}"))
        return [file for file in names if _ATTEMPT.fullmatch(PurePosixPath(file).name)]

    def lease(self, name: str) -> Lease:
        """Return the lease that allows running a schedule.

        Raises:
            FolderBusyError: another runner holds it; the message says which.
        """
        return Lease.acquire(Store(self._store.join("leases", name)))

    def nights(self, name: str) -> Iterator[Night]:
        """Yield all attempts of a schedule, latest first, reading them one by one."""
        return (self._read(file, Night) for file in reversed(self._nights(name)))

    def recent(self, schedule: Schedule) -> list[Night]:
        """Return the attempts from the last settled due time on."""
        found: list[Night] = []
        for due, attempts in itertools.groupby(self.nights(schedule.name), lambda n: n.due):
            found = [*reversed(list(attempts)), *found]
            if is_settled(due, found, schedule.retries):
                break
        return found

    def running(self, name: str) -> Night | None:
        """Return the attempt that has started and not ended; its runner may have died since."""
        if not self._store.exists(_running(name)):
            return None
        return self._read(_running(name), Night)

    def begin(self, night: Night) -> None:
        """Record that an attempt has started."""
        self._store.write_bytes(_running(night.schedule), night.to_json())

    def end(self, night: Night) -> None:
        """Add an attempt to the log; an existing record of it stays."""
        self._store.create_bytes(f"nights/{_stem(night)}.json", night.to_json())
        self._store.delete(_running(night.schedule))

    def log_name(self, night: Night) -> str:
        """Return the name, in the store, of the file with an attempt's output."""
        return f"logs/{_stem(night)}.log"

    def location(self, name: str) -> str:
        """Return the full path or URL of a file in the store."""
        return self._store.join(name)

    @contextmanager
    def output_file(self, name: str) -> Iterator[Path]:
        """Provide a local file for an attempt's output.

        If the store is a local folder it is the file in the store, so that it can be followed; else
        it is uploaded when the block ends.
        """
        local = self._store.local_path(name)
        if local is not None:
            local.parent.mkdir(parents=True, exist_ok=True)
            yield local
        else:
            with self._store.local_target(name) as path:
                yield path

    def _nights(self, name: str) -> list[str]:
        return self._store.list(f"nights/{name}")

    def _read(self, file: str, kind: type[_Record]) -> _Record:
        try:
            return kind.model_validate_json(self._store.read_bytes(file))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ScheduleError(
                f"{self._store.join(file)} is damaged or has another version's format ({where}: "
                f"{first['msg']}); delete it, and add the schedule again if it was one"
            ) from None


def open_book(url: str) -> Book:
    """Open the store at a path or URL; ``~`` means the home folder."""
    return Book(str(Path(url).expanduser()) if url.startswith("~") else url)


def _schedule(name: str) -> str:
    return f"schedules/{name}.json"


def _running(name: str) -> str:
    return f"running/{name}.json"


def _stem(night: Night) -> str:
    return f"{night.schedule}/{night.due:%Y%m%dT%H%M%SZ}-{night.attempt:02d}"
