"""The right to write to a run folder: one run at a time.

A lease is a small file, ``lease/000003.json``, that only its holder writes. The highest number
counts. To take a free folder, a run creates the next number; if several try at once, the storage
lets one succeed. The holder renews its file periodically; a lease that is not renewed expires, and
a holder that finds a higher number has lost the folder. So no file ever has two writers, and the
storage need support no more than "create unless it exists".

If the storage does not support that, a lease is written and read back after a delay. Two runs that
start within that delay may not be distinguished; such a storage allows nothing better.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Self
from uuid import uuid4

import psutil  # type: ignore[import-untyped]

from pipeline.errors import FolderBusyError, LeaseLostError, StorageError
from pipeline.storage import Store, json_bytes, last_number, now_text, numbered

FOLDER = "lease"
EXPIRES_S = 60.0
NOT_EXCLUSIVE = (
    "this storage does not let only one of two writers create a file; two runs that start within "
    "two seconds of each other may both get the folder: start one at a time"
)
_BEATS = 4
_CLAIMS = 8
_SETTLE_S = 2.0
_SAME_START_S = 5.0


@dataclass(frozen=True)
class Holder:
    """The contents of a lease: the run that holds it.

    Attributes:
        token: drawn at random and unique to the lease.
        host: name of the machine, for people.
        machine: the scope of the process number: machine, boot time, container.
        pid: number of the run's process.
        process_started: when that process began, in seconds since 1970, because numbers are reused.
        since: when the run took the folder.
        renewed_at: time of the last renewal, by the holder's own clock.
        expires_s: seconds without renewal after which the folder is free.
        released_at: when the run released the folder; None while it holds it.
    """

    token: str
    host: str
    machine: str
    pid: int
    process_started: float
    since: str
    renewed_at: str
    expires_s: float
    released_at: str | None = None

    @classmethod
    def here(cls, expires_s: float) -> Holder:
        """A holder for this process."""
        pid, now = os.getpid(), now_text()
        began = psutil.Process(pid).create_time()
        return cls(uuid4().hex, platform.node(), _machine(), pid, began, now, now, expires_s)

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended: it ran on this machine."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            # Start times derive from a clock that may have been adjusted since.
            other = abs(process.create_time() - self.process_started) > _SAME_START_S
            return other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """The right to write to a folder; a context manager that releases it on exit.

    A thread renews it. Call `check` before each write.

    Attributes:
        exclusive: whether the storage itself guarantees a single holder.
    """

    def __init__(self, store: Store, name: str, holder: Holder, exclusive: bool) -> None:
        self.exclusive = exclusive
        self._store, self._name, self._holder = store, name, holder
        self._renewed = time.monotonic()
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls, store: Store, *, expires_s: float = EXPIRES_S, settle_s: float = _SETTLE_S
    ) -> Lease:
        """Take a folder that no running process holds.

        Args:
            store: the folder.
            expires_s: seconds without renewal after which others may take it; it is renewed four
                times as often.
            settle_s: seconds between writing and reading back if the storage is not exclusive.

        Raises:
            FolderBusyError: another run holds it; the message names it and says what to do.
            StorageError: the folder cannot be read or written.
        """
        exclusive, now = _probe(store)
        holder = Holder.here(expires_s)
        for _ in range(_CLAIMS):
            number = last_number(store, FOLDER)
            if number:
                _refuse_if_held(store, numbered(FOLDER, number), now)
            name = numbered(FOLDER, number + 1)
            if _claim(store, name, holder, None if exclusive else settle_s):
                with suppress(StorageError):
                    for earlier in range(max(1, number - 1), number + 1):
                        store.delete(numbered(FOLDER, earlier))
                return cls(store, name, holder, exclusive)
        raise FolderBusyError(
            f"{store.url} keeps being taken by other runs; start one run at a time"
        )

    def check(self) -> None:
        """Verify that this run still holds the folder.

        Raises:
            LeaseLostError: this run no longer holds it.
            StorageError: the lease cannot be read or renewed.
        """
        # Renew before looking, so that no other run takes over between the look and the write.
        if time.monotonic() - self._renewed > self._holder.expires_s / 2:
            self.renew()
        last = last_number(self._store, FOLDER)
        if last == int(PurePosixPath(self._name).stem):
            if self.exclusive or _read(self._store, self._name).token == self._holder.token:
                return
            last += 1
        raise LeaseLostError(self._loss(last))

    def renew(self) -> None:
        """Renew the lease."""
        with self._writing:
            if self._ended.is_set():
                return
            if not self.exclusive and _read(self._store, self._name).token != self._holder.token:
                return
            started = time.monotonic()
            self._write(replace(self._holder, renewed_at=now_text()))
            self._renewed = started

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        with self._writing:
            if self._ended.is_set():
                return
            self._ended.set()
        self._thread.join()
        # If this fails, the lease expires by itself; the original error matters more.
        with suppress(StorageError):
            if _read(self._store, self._name).token == self._holder.token:
                self._write(replace(self._holder, renewed_at=now_text(), released_at=now_text()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(self._holder.expires_s / _BEATS):
            # The next beat tries again; if none succeeds, `check` reports it.
            with suppress(StorageError):
                self.renew()

    def _write(self, holder: Holder) -> None:
        self._store.write_json(self._name, asdict(holder))

    def _loss(self, last: int) -> str:
        try:
            who = f"was taken over by {_read(self._store, numbered(FOLDER, last))}"
        except StorageError:
            who = "is no longer held by this run: its lease file is gone or another's"
        return (
            f"{self._store.url} {who}; this run has stopped and written nothing more. Its lease "
            f"was not renewed for {self._holder.expires_s:g} s: was its machine suspended, or the "
            "storage out of reach? Finished work is kept: run the same job again when the other "
            "run has ended"
        )


def last_holder(store: Store) -> tuple[Holder, float] | None:
    """A folder's last holder and the seconds since its last renewal; None if it never had one.

    Nothing is written, so the seconds compare two clocks: the storage's and this machine's.

    Raises:
        StorageError: the folder cannot be read.
    """
    number = last_number(store, FOLDER)
    if not number:
        return None
    name = numbered(FOLDER, number)
    holder = _read(store, name)
    written = store.modified(name) or datetime.fromisoformat(holder.renewed_at)
    return holder, max(0.0, (datetime.now(UTC) - written).total_seconds())


def _probe(store: Store) -> tuple[bool, datetime | None]:
    """Whether the storage lets only one of two writers create a file, and the time of its clock."""
    name = f"{FOLDER}/probe-{uuid4().hex}"
    exclusive = store.creates_exclusively
    try:
        if exclusive:
            exclusive = store.create_bytes(name, b"1") and not store.create_bytes(name, b"2")
    except StorageError:
        # Storages report in many ways that they do not support such a request. One that cannot be
        # written to at all fails in the next line.
        exclusive = False
    try:
        store.write_bytes(name, b"3")
        return exclusive, store.modified(name)
    finally:
        with suppress(StorageError):
            store.delete(name)


def _refuse_if_held(store: Store, name: str, now: datetime | None) -> None:
    holder = _read(store, name)
    if holder.released_at or holder.is_dead:
        return
    written = store.modified(name)
    if now is None or written is None:
        now, written = datetime.now(UTC), datetime.fromisoformat(holder.renewed_at)
    silent_s = max(0.0, (now - written).total_seconds())
    if silent_s > holder.expires_s:
        return
    left_s = holder.expires_s - silent_s
    raise FolderBusyError(
        f"{store.url} is being written by another run ({holder}; last heard of {silent_s:.0f} s "
        "ago). Wait until it has ended, stop it, or name another output; if it has died, the "
        f"folder is free in {left_s:.0f} s"
    )


def _claim(store: Store, name: str, holder: Holder, settle_s: float | None) -> bool:
    """Create a lease; False if another run was faster."""
    data = json_bytes(asdict(holder))
    if settle_s is None:
        # A retried request whose first response came too late finds its own file.
        return store.create_bytes(name, data) or _read(store, name).token == holder.token
    if store.exists(name):
        return False
    store.write_bytes(name, data)
    time.sleep(settle_s)
    return _read(store, name).token == holder.token


def _read(store: Store, name: str) -> Holder:
    try:
        return Holder(**store.read_json(name))
    except TypeError:
        raise StorageError(
            f"{store.join(name)} is not a lease of this version; delete it if the folder is unused"
        ) from None


def _machine() -> str:
    """The scope of process numbers: each container of a host is its own."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
