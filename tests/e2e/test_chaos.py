"""A job that is disturbed repeatedly ends like an undisturbed one.

Its driver is killed and restarted; a worker or a rank is killed, from which the running job must
recover; and S3 becomes unreachable for a few seconds. ``PMET_CHAOS_KILLS`` sets how often the
driver is killed, ``PMET_CHAOS_SEED`` draws the moments, ``PMET_CHAOS_STORE`` sets where the job's
files are: ``local``, ``s3`` or both, separated by a comma.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from pipeline.job.config import dump_job
from pipeline.storage.store import Store
from tests.conftest import GOLDEN, ROOT
from tests.e2e.conftest import assert_same_targets, assert_same_weights, job, targets_by_row

KILLS = int(os.environ.get("PMET_CHAOS_KILLS", "1"))
SEED = int(os.environ.get("PMET_CHAOS_SEED", "0"))
STORES = os.environ.get("PMET_CHAOS_STORE", "s3").split(",")
FINISHED, KILLED = 0, -signal.SIGKILL
LIMIT_S = 300
OUTAGE_S = (1.0, 6.0)
# What a run on Ray takes longer than one in this process: its processes start.
START_S = 15.0
# Ray's names for the processes of the workers and of the ranks.
COMPUTING = re.compile(r"ray::(_WorkerProcess|_RankProcess)")

# The driver: dies after a time, or during or right after the n-th file that it writes.
DRIVER = """
import os, signal, sys, threading, time
from contextlib import contextmanager
from pipeline.job.config import load_job
from pipeline.run import run_job
from pipeline.storage.store import Store

kind, when = sys.argv[2], float(sys.argv[3])
written, start = 0, time.monotonic()
write_stream, write_bytes = Store.write_stream, Store.write_bytes

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_soon():
    # A request to S3 takes some milliseconds.
    threading.Timer(0.004, die).start()

@contextmanager
def counted(self, name):
    global written
    written += 1
    number = written
    with write_stream(self, name) as stream:
        yield stream
        if kind == "inside" and number == when:
            stream.flush()
            die() if self.is_local else die_soon()
    if kind == "after" and number == when:
        die()

def counted_bytes(self, name, data):
    global written
    if not self.is_local:
        written += 1
        if kind == "inside" and written == when:
            die_soon()
    write_bytes(self, name, data)
    if not self.is_local and kind == "after" and written == when:
        die()

Store.write_stream, Store.write_bytes = counted, counted_bytes
if kind == "time":
    timer = threading.Timer(when, die)
    timer.daemon = True
    timer.start()
run_job(load_job(sys.argv[1]))
print(written, time.monotonic() - start)
"""


@dataclass
class Place:
    """The storage of the jobs' files, and the faults that can happen to it."""

    root: str
    inputs: str
    model: str
    server: ThreadedMotoServer | None = None

    def go_away(self, seconds: float) -> None:
        """Make the storage unreachable for a while."""
        assert self.server is not None
        host, port = self.server.get_host_and_port()
        self.server.stop()
        time.sleep(seconds)
        self.server = ThreadedMotoServer(ip_address=host, port=port, verbose=False)
        self.server.start()


@dataclass
class Disturbance:
    """The faults of one attempt at a job, in seconds from its start; None: no fault."""

    driver: tuple[str, float] = ("never", 0)
    worker: float | None = None
    outage: tuple[float, float] | None = None
    happened: list[str] = field(default_factory=list)


@pytest.fixture(params=STORES)
def place(
    request: pytest.FixtureRequest, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    if request.param == "local":
        yield Place(str(tmp_path), str(inputs), str(GOLDEN / "gpt2" / "model"))
        return
    # A separate server, because it is stopped and started again.
    url = str(request.getfixturevalue("s3_url"))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    # Copies of remote models, including what killed drivers leave of them.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    store = Store(url)
    for folder, name in ((inputs, "inputs"), (GOLDEN / "gpt2" / "model", "model")):
        for file in folder.iterdir():
            store.write_bytes(f"{name}/{file.name}", file.read_bytes())
    place = Place(url, store.join("inputs"), store.join("model"), server)
    yield place
    assert place.server is not None
    place.server.stop()


def drive(file: Path, disturbance: Disturbance, place: Place) -> tuple[int, str]:
    """Run a job until it ends or dies; return the exit status and the output."""
    kind, when = disturbance.driver
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(file), kind, str(when)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        start = time.monotonic()

        def due(when: float | None) -> bool:
            return when is not None and time.monotonic() - start >= when

        kills, outage = disturbance.worker, disturbance.outage
        while process.poll() is None:
            if time.monotonic() - start > LIMIT_S:
                process.kill()
                pytest.fail(f"the job did not end: {process.communicate()[0]}")
            if due(kills) and (killed := kill_one_of(process.pid)):
                disturbance.happened.append(f"{killed} at {time.monotonic() - start:.0f} s")
                kills = None
            if outage is not None and due(outage[0]):
                place.go_away(outage[1])
                disturbance.happened.append(f"S3 away for {outage[1]:.0f} s at {outage[0]:.0f} s")
                outage = None
            time.sleep(0.02)
        return process.returncode, process.communicate()[0]


def kill_one_of(driver: int) -> str | None:
    """Kill a worker or a rank of a running job; return which, if there is one."""
    try:
        children = psutil.Process(driver).children(recursive=True)
        named = [(p, " ".join(p.cmdline()).strip()) for p in children]
    except psutil.Error:
        return None
    computing = [(p, name) for p, name in named if COMPUTING.match(name)]
    if not computing:
        return None
    process, name = random.choice(computing)
    process.kill()
    return name


def job_file(folder: Path, place: Place, **changes: Any) -> Path:
    on_ray = {"targets": {"workers": 1, "shard_size": 8}, "update": {"ranks": 1}}
    settings = job(
        Path("unused"),
        f"{place.root}/{folder.name}/out",
        model=place.model,
        requests=(f"{place.inputs}/requests.parquet",),
        corpus=(f"{place.inputs}/corpus.parquet",),
        evaluate={"sample": 8},
        **on_ray | changes,
    )
    folder.mkdir()
    (folder / "job.yaml").write_text(dump_job(settings))
    return folder / "job.yaml"


def output(file: Path, place: Place) -> Store:
    """Return the run folder of a job."""
    return Store(f"{place.root}/{file.parent.name}/out")


def files(folder: Store) -> list[str]:
    """Return all files, including hidden ones, without the mark of the attempt that wrote them."""
    names = folder.list(unfinished=True)
    return sorted(re.sub(r"-[0-9a-f]{32}|\d{6}(?=\.json)", "", name) for name in names)


def stage(folder: Store) -> str:
    """Describe the progress of a killed run."""
    said = folder.read_json("run.json") if folder.exists("run.json") else {}
    return str(said.get("stage") or "between two stages")


def weights(folder: Store) -> dict[str, torch.Tensor]:
    with folder.local_copy("model/model.safetensors") as path:
        return load_file(path)


def assert_as_undisturbed(undisturbed: Store, folder: Store) -> None:
    """Assert equal files, bit-equal targets, equal weights and scores, and no leftovers."""
    assert files(folder) == files(undisturbed)
    assert_same_targets(targets_by_row(undisturbed), targets_by_row(folder))
    assert_same_weights(weights(undisturbed), weights(folder))
    metrics, again = (each.read_json("metrics.json") for each in (undisturbed, folder))
    assert again["counts"] == metrics["counts"]
    figures, expected = (
        {name: value for name, value in found["after"].items() if value is not None}
        for found in (again, metrics)
    )
    assert figures == pytest.approx(expected, rel=1e-4)
    assert folder.read_json("run.json")["status"] == "complete"


def drawn(draw: random.Random, written: int, seconds: float, place: Place) -> Disturbance:
    """Draw the faults of an attempt at a job that takes this many writes and seconds."""
    kind = draw.choice(["inside", "after", "time"])
    when = draw.uniform(1, seconds) if kind == "time" else float(draw.randint(1, written))
    return spared(draw, seconds, place, (kind, when))


def spared(
    draw: random.Random, seconds: float, place: Place, driver: tuple[str, float] = ("never", 0)
) -> Disturbance:
    """Draw the faults of an attempt whose driver survives by default."""
    outage = (draw.uniform(1, seconds), draw.uniform(*OUTAGE_S)) if place.server else None
    return Disturbance(driver, draw.uniform(1, seconds), outage)


# A worker to kill is found among the driver's children.
@pytest.mark.usefixtures("cold_python")
@pytest.mark.slow
@pytest.mark.timeout(300 + 150 * KILLS)
def test_a_run_that_is_disturbed_again_and_again_ends_as_an_undisturbed_one(
    place: Place, tmp_path: Path
) -> None:
    # In one process, which writes the same files.
    here = {"targets": {"workers": 0, "shard_size": 8}, "update": {"ranks": 0}}
    undisturbed = job_file(tmp_path / "undisturbed", place, **here)
    status, said = drive(undisturbed, Disturbance(), place)
    assert status == FINISHED, said
    written, seconds = int(said.split()[-2]), float(said.split()[-1]) + START_S
    draw, told, deaths, file = random.Random(SEED), [], 0, None
    random.seed(SEED)
    number = 0

    def attempt(make: Callable[[], Disturbance]) -> int:
        nonlocal file, number
        if file is None:
            number += 1
            file = job_file(tmp_path / f"disturbed-{number}", place)
        disturbance = make()
        status, said = drive(file, disturbance, place)
        assert status in (KILLED, FINISHED), said
        kind, when = disturbance.driver
        where = f"{kind} {when:.0f}, {stage(output(file, place))}" if status == KILLED else "ended"
        told.append("; ".join([f"job {number}: {where}", *disturbance.happened]))
        (tmp_path / "deaths.txt").write_text("\n".join([*told, f"{written} writes, {seconds} s"]))
        if status == FINISHED:
            assert_as_undisturbed(output(undisturbed, place), output(file, place))
            file = None
        return status

    while deaths < KILLS:
        deaths += attempt(lambda: drawn(draw, written, seconds, place)) == KILLED
    # Finish what is left, with one more kill that the job must recover from.
    attempt(lambda: spared(draw, seconds / 2, place))
