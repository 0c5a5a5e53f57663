"""Runs schedules as they become due, or runs what is due now and exits."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from jobs.schedule.book import Book
from jobs.schedule.due import Task, next_task
from jobs.schedule.night import Clock, last_lines, outcome_of, refresh_command, run_night
from jobs.schedule.records import Night, Outcome, Schedule
from pipeline.errors import FolderBusyError, LeaseLostError, ScheduleError, StorageError
from pipeline.run_folder import Lease

# How often to reread the store, and to retry a lease that another runner holds.
POLL = timedelta(seconds=30)
_EXIT: dict[Outcome, int] = {"done": 0, "left out": 0, "bad input": 2, "held back": 3}


class Runner:
    """Runs the schedules of a store, one run at a time, each under its schedule's lease."""

    def __init__(
        self,
        book: Book,
        *,
        clock: Clock,
        say: Callable[[str], None],
        names: Sequence[str] = (),
        command: Callable[[Schedule], list[str]] = refresh_command,
    ) -> None:
        """Make a runner; it reads the store when it runs.

        Args:
            book: the store.
            clock: the clock, which also carries the request to stop.
            say: called with a line for each event.
            names: the schedules to run; if empty, all that exist at the time.
            command: returns the command to run for a schedule.
        """
        self._book, self._clock, self._say = book, clock, say
        self._names, self._command = tuple(names), command
        self._said: set[str] = set()

    def serve(self) -> None:
        """Run schedules as they become due, until the clock is stopped.

        If the store is unreachable or a file in it is damaged, report it and wait.
        """
        while not self._clock.stopped:
            now = self._clock.now()
            wake = now + POLL
            try:
                for schedule, task in self._tasks():
                    if task.at > now:
                        wake = min(wake, task.at)
                    elif self._run(schedule.name):
                        # That took a while: look at everything again.
                        wake = now
                        break
            except StorageError as error:
                self._say_once(str(error))
            self._clock.wait((wake - self._clock.now()).total_seconds())

    def run_due(self) -> int:
        """Run what is due now, including retries after failures.

        Returns:
            The highest exit status of the schedules' last attempts, where an attempt without one
            counts as 1; 0 if all succeeded or nothing was due.

        Raises:
            ScheduleError: a named schedule does not exist.
            StorageError: the store cannot be read or written.
        """
        for name in self._names:
            self._book.get(name)
        began, statuses = self._clock.now(), dict[str, int]()
        elsewhere: set[str] = set()
        while not self._clock.stopped:
            left = [
                (schedule, task)
                for schedule, task in self._tasks()
                if task.due <= began and schedule.name not in elsewhere
            ]
            if not left:
                break
            schedule, task = left[0]
            wait_s = (task.at - self._clock.now()).total_seconds()
            if wait_s > 0:
                self._clock.wait(wait_s)
            elif night := self._run(schedule.name):
                statuses[schedule.name] = _EXIT.get(night.outcome, 1)
            else:
                elsewhere.add(schedule.name)
        return max(statuses.values(), default=0)

    def _tasks(self) -> list[tuple[Schedule, Task]]:
        """Return the next run of each schedule, earliest first."""
        now, tasks = self._clock.now(), []
        for name in self._names or self._book.names():
            try:
                schedule = self._book.get(name)
                task = next_task(schedule, self._book.recent(schedule), now)
            except ScheduleError as error:
                self._say_once(f"{name}: {error}")
                continue
            if task is not None:
                tasks.append((schedule, task))
        return sorted(tasks, key=lambda pair: pair[1].at)

    def _run(self, name: str) -> Night | None:
        """Run a schedule if it is due and no other runner holds it; return the attempt, or None."""
        try:
            lease = self._book.lease(name)
        except FolderBusyError as error:
            self._say_once(f"{name}: not run here because another runner holds it. {error}")
            return None
        try:
            with lease:
                # Before this lease was acquired another runner may have run it, or a user removed
                # it.
                schedule = self._book.get(name)
                if dead := self._book.running(name):
                    self._end(lease, dead.model_copy(update={"outcome": "died"}))
                task = next_task(schedule, self._book.recent(schedule), self._clock.now())
                if task is None or task.at > self._clock.now():
                    return None
                night = self._attempt(lease, schedule, task)
                self._end(lease, night)
                return night
        except (LeaseLostError, ScheduleError) as error:
            self._say(f"{name}: {error}")
            return None

    def _attempt(self, lease: Lease, schedule: Schedule, task: Task) -> Night:
        night = Night(
            schedule=schedule.name,
            due=task.due,
            covers=task.covers,
            attempt=task.attempt,
            host=platform.node(),
            pid=os.getpid(),
            started=self._clock.now(),
        )
        if task.is_late:
            return night.model_copy(update={"finished": night.started, "outcome": "left out"})
        night = night.model_copy(update={"log": self._book.log_name(night)})
        self._say(f"{schedule.name}: the run due {_when(night)} starts")
        self._book.begin(night)
        ended: dict[str, object] = {}
        try:
            with self._book.output_file(str(night.log)) as output:
                ended = self._process(lease, schedule, output)
        except StorageError as error:
            if not ended:
                raise
            # The outcome of the run matters more than its output.
            self._say(f"{schedule.name}: the output of the run is lost: {error}")
            ended["log"] = None
        return night.model_copy(update={"finished": self._clock.now(), **ended})

    def _process(self, lease: Lease, schedule: Schedule, output: Path) -> dict[str, object]:
        try:
            status = run_night(
                self._command(schedule),
                directory=schedule.directory,
                output=output,
                clock=self._clock,
                check=lease.check,
            )
        except OSError as error:
            return {"outcome": "failed", "output": (f"cannot be started: {error}",)}
        outcome = outcome_of(status)
        if outcome == "failed" and self._clock.stopped:
            outcome = "interrupted"
        return {"exit_status": status, "outcome": outcome, "output": last_lines(output)}

    def _end(self, lease: Lease, night: Night) -> None:
        """Add an attempt to the log, waiting as long as the store is unreachable."""
        while True:
            try:
                lease.check()
                self._book.end(night)
                break
            except StorageError as error:
                if self._clock.stopped:
                    raise
                self._say_once(f"{night.schedule}: its outcome is not yet in the log: {error}")
                self._clock.wait(POLL.total_seconds())
        self._say(f"{night.schedule}: the run due {_when(night)}: {night.words}")

    def _say_once(self, line: str) -> None:
        """Report a line once, not at every poll; repeated lines differ only in their digits."""
        seen = "".join(character for character in line if not character.isdigit())
        if seen not in self._said:
            self._said.add(seen)
            self._say(line)


def _when(night: Night) -> str:
    more = len(night.covers) - 1
    runs = "run" if more == 1 else "runs"
    missed = f" (also covers {more} missed {runs})" if more else ""
    return f"{night.due:%Y-%m-%d %H:%M} UTC{missed}"
