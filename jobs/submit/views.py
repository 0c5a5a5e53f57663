"""Terminal output about submissions and runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.submit.state import RunState
from jobs.submit.submission import Submission, hint
from pipeline.evaluation import duration
from pipeline.events import UNITS

_EVENTS = 3
_NEXT = {
    "lost": "the run has stopped responding; run or submit the same job again to resume it",
    "failed": "run or submit the same job again to resume it",
    "stopped": "run or submit the same job again to resume it",
}


def show_status(
    state: RunState | None, job: Submission | None, console: Console, *, where: str = ""
) -> None:
    """Print the state of a run from its folder and from the cluster."""
    table = Table("", "", show_header=False, box=None)
    for name, value in [*_of_cluster(job, where), *_of_folder(state, job)]:
        table.add_row(name, Text(value))
    console.print(table)


def show_list(jobs: list[Submission], console: Console) -> None:
    """Print the submissions that a cluster knows."""
    table = Table("submission", "status", "exit", "submitted", box=None)
    table.add_column("run folder", overflow="fold")
    for job in jobs:
        when = datetime.fromtimestamp(job.submitted_ms / 1000).astimezone()
        exit_status = "" if job.exit_status is None else str(job.exit_status)
        cells = (job.name, job.status, exit_status, f"{when:%Y-%m-%d %H:%M}", job.output)
        table.add_row(*map(Text, cells))
    console.print(table)


def as_json(job: Submission | None) -> dict[str, Any] | None:
    """Return a submission as JSON values."""
    if job is None:
        return None
    return {"name": job.name, "status": job.status, "exit_status": job.exit_status}


def _of_cluster(job: Submission | None, where: str) -> list[tuple[str, str]]:
    if job is None:
        return []
    rows = [("submission", f"{job.name} on {where}"), ("status", job.status)]
    if job.exit_status is not None:
        rows.append(("exit status", str(job.exit_status)))
    if advice := hint(job):
        rows.append(("", advice))
    if job.ended and job.exit_status:
        rows += [("message", line) for line in job.message.strip().splitlines()[-_EVENTS:]]
    return rows


def _of_folder(state: RunState | None, job: Submission | None) -> list[tuple[str, str]]:
    if state is None:
        return [("run folder", "no run there yet")]
    run = state.run
    rows = [("run folder", state.url), ("state", f"{state.state}, attempt {run.get('attempt')}")]
    if job is not None and run.get("submission") != job.name:
        rows.append(("", "this attempt is not this submission's"))
    if state.state in _NEXT:
        rows.append(("", _NEXT[state.state]))
    if run.get("error"):
        rows.append(("error", str(run["error"])))
    if job is None and run.get("exit_status") is not None:
        rows.append(("exit status", str(run["exit_status"])))
    if state.silent_s is not None:
        rows.append(("last sign of life", f"{duration(state.silent_s)} ago"))
    rows += _stage(state)
    done = [f"{s['name']} {duration(s['seconds'])}" for s in run.get("stages", [])]
    if done:
        rows.append(("finished", ", ".join(done)))
    counts = run.get("counts") or {}
    if counts:
        rows.append(("requests", ", ".join(f"{n} {name}" for name, n in counts.items())))
    events = run.get("events", [])
    rows += [("event", f"{e['kind']}: {e['text']}") for e in events[-_EVENTS:]]
    if len(events) > _EVENTS:
        rows.append(("", f"the last {_EVENTS} of {len(events)}; run.json lists all"))
    return rows


def _stage(state: RunState) -> list[tuple[str, str]]:
    run = state.run
    if not run.get("stage"):
        return []
    progress = run.get("progress") or {}
    text = str(run["stage"])
    if progress.get("done") is not None:
        unit = UNITS.get(text, "")
        text += f", {progress['done']} of {progress.get('total') or '?'} {unit}".rstrip()
    if progress.get("rate"):
        text += f", {progress['rate']:.3g}/s"
    if state.state == "running" and (left := state.seconds_left) is not None:
        text += f", about {duration(left)} left"
    rows = [("stage", text)]
    detail = progress.get("detail") or {}
    if "shards" in detail:
        rows.append(("shards", f"{detail.get('finished', 0)} of {detail['shards']} done"))
    return rows
