"""Starts, watches and stops the process of a scheduled run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from jobs.schedule.records import Outcome, Schedule
from pipeline.cluster import STOPPING
from pipeline.errors import StorageError

# Seconds that a run has to end by itself after SIGTERM.
STOP_S = 60.0
CHECK_S = 15.0
_TAIL_BYTES = 8192
_TAIL_LINES = 10
_LONGEST_LINE = 300
_OUTCOMES: dict[int | None, Outcome] = {0: "done", 2: "bad input", 3: "held back"}
# Colours, cursor movements and other terminal control sequences.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Clock:
    """A clock whose waits are interrupted by signals and by the end of a process.

    Attributes:
        stopped: whether the runner has been asked to stop.
    """

    def __init__(self) -> None:
        self.stopped = False
        # Unlike an event, it is safe to use in a signal handler.
        self._events: SimpleQueue[None] = SimpleQueue()

    def now(self) -> datetime:
        """Return the current time in UTC."""
        return datetime.now(UTC)

    def wait(self, seconds: float) -> None:
        """Wait until ``wake`` is called, for at most ``seconds``."""
        with suppress(Empty):
            self._events.get(timeout=max(0.0, seconds))

    def wake(self) -> None:
        """End the current wait, or the next one."""
        self._events.put(None)

    def stop(self) -> None:
        """Ask the runner to stop."""
        self.stopped = True
        self.wake()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Stop the runner on SIGTERM, SIGINT and SIGHUP; ignored signals stay ignored."""
        before = {number: signal.getsignal(number) for number in STOPPING}
        heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in heard:
            signal.signal(number, lambda *_: self.stop())
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])


def refresh_command(schedule: Schedule) -> list[str]:
    """Return the command of a run: ``pmet refresh`` by this interpreter, in any working folder."""
    return [sys.executable, "-P", "-m", "jobs", "refresh", schedule.refresh]


def run_night(
    command: Sequence[str],
    *,
    directory: str | None,
    output: Path,
    clock: Clock,
    check: Callable[[], None],
    stop_s: float = STOP_S,
) -> int:
    """Run a command to its end, or until the clock is stopped.

    Args:
        command: program and arguments; no shell is involved.
        directory: working folder; None: the current one.
        output: file for its output.
        clock: when it is ``stopped`` the command is stopped, with SIGTERM first.
        check: called every 15 seconds; an exception from it stops the command too, except
            ``StorageError``: a store that is briefly unreachable must not end a run.
        stop_s: seconds from SIGTERM to SIGKILL.

    Returns:
        The exit status, or minus the signal that ended the command.

    Raises:
        OSError: the command cannot be started.
    """
    tied = [sys.executable, "-P", "-m", "jobs.schedule.tied", str(os.getpid()), *command]
    with output.open("wb") as file:
        # In a session of its own: Ctrl-C reaches only the runner, which then stops the run.
        process = subprocess.Popen(
            tied,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    watch = Thread(target=_wake_at_end, args=(process, clock), name="night", daemon=True)
    watch.start()
    try:
        while process.poll() is None and not clock.stopped:
            clock.wait(CHECK_S)
            with suppress(StorageError):
                check()
    finally:
        if process.poll() is None:
            _stop(process, stop_s)
    return process.returncode


def outcome_of(exit_status: int) -> Outcome:
    """Return the outcome for an exit status of ``pmet refresh``."""
    return _OUTCOMES.get(exit_status, "failed")


def last_lines(file: Path) -> tuple[str, ...]:
    """Return the last lines of a run's output as text that is safe for a terminal."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = _CONTROL.sub("", stream.read().decode(errors="replace"))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return tuple(line[:_LONGEST_LINE] for line in lines[-_TAIL_LINES:])


def _wake_at_end(process: subprocess.Popen[bytes], clock: Clock) -> None:
    process.wait()
    clock.wake()


def _stop(process: subprocess.Popen[bytes], stop_s: float) -> None:
    process.terminate()
    try:
        process.wait(stop_s)
    except subprocess.TimeoutExpired:
        # Stops its children too: the run leads a process group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
