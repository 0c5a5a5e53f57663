"""Real processes: how a run ends, and what ends it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.schedule.night import Clock, last_lines, outcome_of, refresh_command, run_night
from pipeline.errors import LeaseLostError, StorageError
from tests.jobs.schedule.conftest import schedule

PATIENCE_S = 60.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(script: str, output: Path, *, clock: Clock | None = None, **options: object) -> int:
    given = {"directory": None, "check": lambda: None} | options
    return run_night(["sh", "-c", script], output=output, clock=clock or Clock(), **given)


def test_a_night_ends_with_its_status_and_its_output(tmp_path: Path) -> None:
    output = tmp_path / "log"
    assert run("pwd; echo oops >&2; exit 3", output, directory=str(tmp_path)) == 3
    assert last_lines(output) == (str(tmp_path), "oops")
    assert run("kill -9 $$", output) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        run("true", output, directory=str(tmp_path / "nowhere"))


def test_a_night_that_is_stopped_may_end_well(tmp_path: Path) -> None:
    output, clock = tmp_path / "log", Clock()
    script = "trap 'echo stopping; exit 5' TERM; echo begun; while :; do sleep 0.01; done"
    stopper = threading.Thread(target=stop_when_begun, args=(output, clock))
    stopper.start()
    assert run(script, output, clock=clock) == 5
    stopper.join()
    assert last_lines(output) == ("begun", "stopping")


def test_a_night_that_does_not_listen_is_killed_with_what_it_started(tmp_path: Path) -> None:
    output, clock = tmp_path / "log", Clock()
    script = "trap '' TERM; sleep 600 & echo $!; echo begun; wait; wait"
    stopper = threading.Thread(target=stop_when_begun, args=(output, clock))
    stopper.start()
    assert run(script, output, clock=clock, stop_s=0.1) == -signal.SIGKILL
    stopper.join()
    child = int(last_lines(output)[0])
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def stop_when_begun(output: Path, clock: Clock) -> None:
    until(lambda: output.exists() and "begun" in output.read_text())
    clock.stop()


def test_a_lost_lease_ends_the_night_and_a_lost_store_does_not(tmp_path: Path) -> None:
    output, clock = tmp_path / "log", Clock()
    said = iter([StorageError("out of reach"), LeaseLostError("taken over")])

    def check() -> None:
        clock.wake()
        until(lambda: output.exists() and output.read_text())
        raise next(said)

    clock.wake()
    with pytest.raises(LeaseLostError):
        run("echo $$; exec sleep 600", output, clock=clock, check=check)
    assert not psutil.pid_exists(int(output.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_night_ends_with_its_runner(tmp_path: Path) -> None:
    """The kernel must send SIGTERM when the runner ends; test_tied really kills a parent."""
    output = tmp_path / "log"
    ask = "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n)"
    command = [sys.executable, "-c", ask]
    run_night(command, directory=None, output=output, clock=Clock(), check=lambda: None)
    assert last_lines(output) == (f"c_int({int(signal.SIGTERM)})",)


def test_signals_stop_the_clock_and_end_a_wait() -> None:
    clock, before = Clock(), signal.getsignal(signal.SIGTERM)
    with clock.stopped_by_signals():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        clock.wait(PATIENCE_S)
        assert time.monotonic() - started < PATIENCE_S / 2
    assert clock.stopped
    assert signal.getsignal(signal.SIGTERM) is before


def test_exit_statuses_have_a_meaning() -> None:
    outcomes = [outcome_of(status) for status in (0, 1, 2, 3, 4, -9)]
    assert outcomes == ["done", "failed", "bad input", "held back", "failed", "failed"]


def test_the_end_of_the_output_is_harmless_text(tmp_path: Path) -> None:
    output = tmp_path / "log"
    lines = [f"line {n}".encode() for n in range(5000)]
    output.write_bytes(
        b"\n".join([*lines, b"\x1b[31mred\x1b[0m\x1b]0;title\x07 \xff", b"", b"x" * 999])
    )
    tail = last_lines(output)
    assert len(tail) == 10
    assert tail[-3:] == ("line 4999", "red]0;title �", "x" * 300)


def test_a_night_is_pmet_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text("raise SystemExit(99)")
    command = refresh_command(schedule(refresh="s3://bucket/r.yaml"))
    assert command[-2:] == ["refresh", "s3://bucket/r.yaml"]
    asked = [*command[:-2], "schedule", "--help"]
    answer = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, shlex.join(asked) + answer.stderr
    assert "Run refreshes on a schedule" in answer.stdout
