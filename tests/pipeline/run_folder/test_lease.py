"""A run folder has one writer: which run gets the lease, and what one that lost it may do."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import FolderBusyError, LeaseLostError, StorageError
from pipeline.run_folder.folder import RunFolder
from pipeline.run_folder.lease import FOLDER, Holder, Lease
from pipeline.storage.store import Store
from tests.conftest import ROOT

DIGESTS = {"job": "1"}

# Another process: takes the lease, prints a line, and holds it until it is killed.
HOLDER = """
import sys, time
from pipeline.run_folder.lease import Lease
from pipeline.storage.store import Store
lease = Lease.acquire(Store(sys.argv[1]), expires_s=float(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""


def held_elsewhere(store: Store, *, silent_s: float = 0.0, expires_s: float = 60.0) -> str:
    """Write the lease of a run on another machine that was renewed a while ago; return its file."""
    name = f"{FOLDER}/000001.json"
    there = replace(Holder.here(expires_s), host="other", machine="other", token="x")
    store.write_json(name, asdict(there))
    if silent_s:
        when = time.time() - silent_s
        os.utime(str(store.local_path(name)), (when, when))
    return name


def test_a_second_run_is_refused_and_the_message_names_the_holder(any_url: str) -> None:
    with Lease.acquire(Store(any_url)) as lease:
        assert lease.exclusive
        lease.check()
        with pytest.raises(FolderBusyError) as refused:
            Lease.acquire(Store(any_url))
        assert re.search(
            rf"is being written by another run \(process {os.getpid()} on .*, "
            r"since 20.*; last heard of \d+ s ago\)\. Wait until it has ended, stop it, or name "
            r"another output; if it has died, the folder is free in \d+ s$",
            str(refused.value),
        )
        lease.check()
    with Lease.acquire(Store(any_url)) as again:
        again.check()
    assert len(Store(any_url).list(FOLDER)) == 1, "a file for each run that there ever was"


def test_of_many_runs_at_once_one_gets_the_folder(any_url: str) -> None:
    def start(_: int) -> Lease | None:
        with suppress(FolderBusyError):
            return Lease.acquire(Store(any_url))
        return None

    with ThreadPoolExecutor(6) as threads:
        leases = [lease for lease in threads.map(start, range(6)) if lease]
    assert len(leases) == 1
    leases[0].check()
    leases[0].release()


def test_it_is_given_back_when_the_run_fails(any_url: str) -> None:
    with pytest.raises(ValueError, match="a bug"), Lease.acquire(Store(any_url)):
        raise ValueError("a bug")
    Lease.acquire(Store(any_url)).release()


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url, "600"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderBusyError, match=f"process {process.pid} on"):
        Lease.acquire(Store(url))
    process.send_signal(signal.SIGKILL)
    # Not reaped: a zombie counts as dead, whether or not its parent has noticed.
    deadline = time.monotonic() + 10
    while True:
        try:
            Lease.acquire(Store(url)).release()
            break
        except FolderBusyError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    process.wait()


def test_a_disk_without_a_free_byte_is_named_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(
            StorageError, match=r"^cannot write .*/lease/probe-\w+ .*make room there"
        ):
            Lease.acquire(Store(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert time.monotonic() - began < 10
    assert not list((tmp_path / "lease").iterdir())


def test_a_silent_holder_on_another_machine_expires(tmp_path: Path) -> None:
    store = Store(tmp_path)
    held_elsewhere(store, silent_s=50)
    with pytest.raises(FolderBusyError, match=r"on other, .*of 50 s ago.* free in 10 s"):
        Lease.acquire(store)
    held_elsewhere(store, silent_s=61)
    Lease.acquire(store).release()


def test_a_number_that_another_process_has_now_does_not_keep_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = held_elsewhere(store)
    store.write_json(name, asdict(replace(Holder.here(60.0), process_started=1e9)))
    Lease.acquire(store).release()


def test_signs_of_life_keep_a_lease(any_url: str) -> None:
    # Object stores report times in whole seconds.
    expires_s = 2.0 if any_url.startswith("s3") else 0.6
    with Lease.acquire(Store(any_url), expires_s=expires_s) as lease:
        time.sleep(1.5 * expires_s)
        with pytest.raises(FolderBusyError, match="being written by another run"):
            Lease.acquire(Store(any_url))
        lease.check()


def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lost = Lease.acquire(store)
    folder = RunFolder(store.url, lost.check)
    folder.begin(DIGESTS, seed=0)
    # As if this process had been suspended for longer than its lease lasts.
    (file,) = store.list(FOLDER)
    os.utime(tmp_path / file, (time.time() - 100, time.time() - 100))
    said = asdict(replace(Holder(**store.read_json(file)), machine="other"))
    store.write_json(file, said)
    os.utime(tmp_path / file, (time.time() - 100, time.time() - 100))
    with Lease.acquire(store) as lease:
        other = RunFolder(store.url, lease.check)
        other.begin(DIGESTS, seed=0)
        before = store.read_bytes("run.json")
        for write in (
            lambda: folder.record("piece", {}),
            folder.write,
            lambda: folder.finish("complete"),
            lambda: folder.begin(DIGESTS, seed=0, fresh=True),
        ):
            with pytest.raises(LeaseLostError) as error:
                write()
        assert re.search(
            r"was taken over by process \d+ on .*, since 20.*; this run has stopped and written "
            r"nothing more.*was its machine suspended.*run the same job again when the other",
            str(error.value),
        )
        assert store.read_bytes("run.json") == before
        assert not store.exists("records/piece.json")
        # Its heartbeat and its end do not disturb the new holder either.
        lost.renew()
        lost.release()
        lease.check()
        with pytest.raises(FolderBusyError):
            Lease.acquire(store)
    Lease.acquire(store).release()


def test_a_late_run_renews_its_lease_before_it_writes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Lease.acquire(store) as lease:
        (file,) = store.list(FOLDER)
        os.utime(tmp_path / file, (1e9, 1e9))
        lease._renewed -= 40
        lease.check()
        written = store.modified(file)
        assert written is not None
        assert datetime.now(UTC) - written < timedelta(seconds=10)


def test_a_folder_that_was_deleted_is_lost(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Lease.acquire(store) as lease:
        store.delete(FOLDER)
        with pytest.raises(LeaseLostError, match="its lease file is gone"):
            lease.check()


class Plain(fsspec.get_filesystem_class("memory")):
    """A storage without conditional writes that ignores the condition."""

    protocol = "plain"
    pipe_file = fsspec.AbstractFileSystem.pipe_file


class Deaf(fsspec.get_filesystem_class("memory")):
    """A service that ignores the condition although its library sends it."""

    protocol = "deaf"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        super().pipe_file(path, value)


class Refusing(Deaf):
    """A service that does not support the condition and refuses the request."""

    protocol = "refusing"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        if mode == "create":
            raise NotImplementedError("a header you provided implies functionality")
        super().pipe_file(path, value)


@pytest.mark.parametrize("kind", [Plain, Deaf, Refusing])
def test_without_conditional_writes_it_reads_back(kind: type, tmp_path: Path) -> None:
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    store = Store(f"{kind.protocol}://{tmp_path.name}/run")

    def start(_: int) -> Lease | None:
        with suppress(FolderBusyError):
            return Lease.acquire(store, settle_s=0.3)
        return None

    with ThreadPoolExecutor(4) as threads:
        leases = [lease for lease in threads.map(start, range(4)) if lease]
    assert len(leases) == 1
    assert not leases[0].exclusive
    leases[0].check()
    # The other of two runs that started at the same time overwrites the file.
    (file,) = store.list(FOLDER)
    store.write_json(file, asdict(replace(Holder.here(60.0), host="faster")))
    leases[0].renew()
    with pytest.raises(LeaseLostError):
        leases[0].check()
    leases[0].release()
    assert Holder(**store.read_json(file)).host == "faster"


def test_without_conditional_writes_the_last_of_two_writers_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation(Plain.protocol, Plain, clobber=True)
    store = Store(f"plain://{tmp_path.name}/run")

    def another_run_writes(_: float) -> None:
        there = replace(Holder.here(60.0), host="other", machine="other")
        store.write_json(f"{FOLDER}/000001.json", asdict(there))

    monkeypatch.setattr(time, "sleep", another_run_writes)
    with pytest.raises(FolderBusyError, match="on other, since"):
        Lease.acquire(store)


def test_a_lease_of_another_version_is_named(any_url: str) -> None:
    Store(any_url).write_json(f"{FOLDER}/000001.json", {"owner": "me"})
    with pytest.raises(
        StorageError, match=r"000001\.json is not a lease of this version; delete it"
    ):
        Lease.acquire(Store(any_url))


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"cannot write .*file/lease/probe"):
        Lease.acquire(Store(tmp_path / "file"))
