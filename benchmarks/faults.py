"""The cost of faults: a driver that is killed and restarted, a worker that is killed.

python -m benchmarks.faults

The job is the demo's, with one worker. Each run is a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.harness import show
from jobs.demo.show import demo_job
from pipeline.run import run_job
from pipeline.run_folder import RunFolder
from pipeline.stages import Context
from pipeline.storage import Store

COMPUTING = "ray::_WorkerProcess.call"
_TICK_S = 0.02


class Clock:
    """Times of events in a run, in seconds from its call; the first of each kind counts."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.times: dict[str, float] = {}

    def note(self, name: str) -> None:
        self.times.setdefault(name, time.monotonic() - self.start)


def main() -> None:
    """Kill a driver, then a worker; resume the run, then run the finished job again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        drive(output, die_after=4)
        kept = drive(output, kill_worker=True)
        finished = targets(output)
        resumed = drive(output)
        assert finished <= targets(output), "a finished shard was recomputed"
        nothing = drive(output)
    rows: list[dict[str, Any]] = [
        {"what": "resumed, until the remaining targets start", **told(resumed, "targets")},
        {"what": "… until the first of them is computed", **told(resumed, "computing")},
        {"what": "finished and run again", **told(nothing, "end")},
        {"what": "killed worker, until it is noticed", **told(kept, "death", "kill")},
        {"what": "… until another one computes", **told(kept, "replaced", "kill")},
    ]
    note = f"{len(finished)} shards were finished when the driver was killed; none was repeated"
    show(f"faults; load {os.getloadavg()[0]:.1f}", rows, options, note)


def told(times: Mapping[str, float], name: str, since: str | None = None) -> dict[str, float]:
    return {"seconds": times[name] - (times[since] if since else 0.0)}


def targets(output: Path) -> set[str]:
    """Return the files of targets named by records."""
    store = Store(output)
    return {
        store.read_json(f"records/{name}")["file"] for name in store.glob("records/targets-*.json")
    }


def drive(output: Path, *, die_after: int = 0, kill_worker: bool = False) -> dict[str, float]:
    """Run the job in its own process; return the times of its events, empty if it was killed.

    Args:
        output: the run folder.
        die_after: finished shards after which the process is killed; 0: never.
        kill_worker: whether to kill the worker once it has finished a shard, and the process once
            another worker computes.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_drive, args=(output, die_after, kill_worker, queue))
    process.start()
    process.join()
    return queue.get() if kill_worker or process.exitcode == 0 else {}


def _drive(output: Path, die_after: int, kill_worker: bool, queue: Queue[dict[str, float]]) -> None:
    output.parent.mkdir(exist_ok=True)
    job = demo_job(output)
    job = job.model_copy(update={"targets": job.targets.model_copy(update={"workers": 1})})
    shards, clock = threading.Semaphore(0), Clock()
    record, event, stage = RunFolder.record, RunFolder.event, Context.stage
    done = 0

    def counted(self: RunFolder, name: str, value: Mapping[str, Any]) -> None:
        nonlocal done
        record(self, name, value)
        if name.startswith("targets-"):
            done += 1
            shards.release()
        if die_after and done == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(self: RunFolder, kind: str, text: str) -> None:
        clock.note(kind)
        event(self, kind, text)

    def begun(self: Context, name: str, total: int) -> Any:
        clock.note(name)
        return stage(self, name, total)

    def watch() -> None:
        if kill_worker:
            shards.acquire()
        first = _computing(clock, "computing")
        if kill_worker:
            first.kill()
            clock.note("kill")
            _computing(clock, "replaced", but=first.pid)
            queue.put(clock.times)
            queue.close()
            queue.join_thread()
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.record, RunFolder.event, Context.stage = counted, heard, begun  # type: ignore[method-assign,assignment]
    threading.Thread(target=watch, daemon=True).start()
    run_job(job)
    clock.note("end")
    queue.put(clock.times)


def _computing(clock: Clock, name: str, but: int | None = None) -> psutil.Process:
    """Wait for a worker process that is computing and return it."""
    while True:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.pid != but and " ".join(child.cmdline()).startswith(COMPUTING):
                    clock.note(name)
                    return child
        time.sleep(_TICK_S)


if __name__ == "__main__":
    main()
