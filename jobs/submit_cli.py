"""``pmet submit``, ``status``, ``logs``, ``stop`` and ``list``: jobs on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs.arguments import JobSettings

if TYPE_CHECKING:
    from jobs.submit.parcel import Parcel
    from jobs.submit.server import JobServer
    from jobs.submit.submission import Submission

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Address = Annotated[
    str | None,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="The cluster's job server, http://HEAD:8265. Default: a cluster on this machine.",
    ),
]
Target = Annotated[
    str, typer.Argument(metavar="RUN_OR_ID", help="A run folder or a submission id.")
]


def submit(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="Job file: a path or a URL.")],
    settings: JobSettings = None,
    address: Address = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the run ends and exit with its status.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Like --wait, and print the run's output.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the files of earlier runs and start over.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job and show what would be submitted.")
    ] = False,
    python: Annotated[
        str,
        typer.Option(
            envvar="PMET_PYTHON", help="Python interpreter on the cluster's nodes that has pmet."
        ),
    ] = "python3",
) -> None:
    """Submit a job to a Ray cluster; submit it again to resume it."""
    from jobs.submit.parcel import pack
    from jobs.submit.server import JobServer
    from jobs.submit.submission import submit as send
    from pipeline.job import load_job

    parcel = pack(load_job(job, settings or []))
    _warn(parcel)
    if dry_run:
        _show(parcel, python, fresh)
        return
    server = JobServer.at(address)
    name, new = send(parcel, server, fresh=fresh, python=python)
    if new:
        out.print(f"submitted {name} to {server.address}", markup=False, soft_wrap=True)
    else:
        out.print(f"{name} is already running; nothing was submitted", markup=False, soft_wrap=True)
    if wait or follow:
        raise typer.Exit(_waited(server, name, follow))
    for what in ("status", "logs -f", "stop"):
        err.print(f"pmet {what} {name}", style="dim", markup=False, soft_wrap=True)


def status(
    target: Target,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show the status of a run, from its folder and from the cluster if there is one."""
    from jobs.submit import views
    from jobs.submit.state import read_state
    from jobs.submit.submission import NAME
    from pipeline.errors import ClusterError, RunFolderError, StorageError
    from pipeline.storage import json_text

    by_name = NAME.fullmatch(target) is not None
    server = found = None
    try:
        if by_name or address:
            server, found = _found(target, address)
    except ClusterError as error:
        if by_name:
            raise
        err.print(f"{error}", style="yellow", markup=False, soft_wrap=True)
    state, folder = None, found.output if found and by_name else target
    try:
        state = read_state(folder)
    except StorageError as error:
        if found is None:
            raise
        err.print(f"{error}", style="yellow", markup=False, soft_wrap=True)
    if state is None and found is None:
        raise RunFolderError(f"{target} holds no run (it has no run.json); name a job's output")
    if as_json:
        said = {"submission": views.as_json(found), "folder": state.as_json() if state else None}
        typer.echo(json_text.dumps(said, indent=2))
    else:
        views.show_status(state, found, out, where=server.address if server else "")


def logs(
    target: Target,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the output until the run ends.")
    ] = False,
    address: Address = None,
) -> None:
    """Print the output of a submitted run."""
    from jobs.submit.submission import wait

    server, found = _submitted(target, address)
    if follow:
        wait(server, found.name, say=_say)
    else:
        _say(server.logs(found.name))


def stop(target: Target, address: Address = None) -> None:
    """Stop a submitted run; its finished work is kept."""
    from jobs.submit.submission import STOP_S, wait

    server, found = _submitted(target, address)
    if found.ended:
        out.print(f"{found.name} has already ended: {found.status}", markup=False, soft_wrap=True)
        return
    server.stop(found.name)
    err.print(f"it has {STOP_S} s to save its work", style="dim", markup=False)
    ended = wait(server, found.name)
    out.print(f"{ended.name}: {ended.status}", markup=False, soft_wrap=True)
    err.print("submit the same job again to resume it", style="dim", markup=False)


def list_(address: Address = None) -> None:
    """Show the runs submitted to a cluster, latest first."""
    from jobs.submit import views
    from jobs.submit.server import JobServer
    from jobs.submit.submission import submissions

    server = JobServer.at(address)
    jobs = submissions(server.jobs())
    if jobs:
        views.show_list(jobs, out)
    else:
        err.print(f"nothing was submitted to {server.address}", markup=False, soft_wrap=True)


def _waited(server: JobServer, name: str, follow: bool) -> int:
    """Wait for a submission to end and print how it ended; return its exit status."""
    from jobs.submit.submission import hint, wait

    ended = wait(server, name, say=_say if follow else None)
    code = 1 if ended.exit_status is None else ended.exit_status
    out.print(f"{name}: {ended.status}, exit status {code}", markup=False, soft_wrap=True)
    if code and not follow:
        err.print(ended.message.strip(), style="red", markup=False, soft_wrap=True)
    if advice := hint(ended):
        err.print(advice, style="yellow", markup=False, soft_wrap=True)
    return code


def _found(target: str, address: str | None) -> tuple[JobServer, Submission | None]:
    """Return the cluster, and the submission with this name or run folder."""
    from jobs.submit.server import JobServer
    from jobs.submit.submission import NAME, find, latest_of

    server = JobServer.at(address)
    if NAME.fullmatch(target):
        return server, find(server, target)
    return server, latest_of(target, server)


def _submitted(target: str, address: str | None) -> tuple[JobServer, Submission]:
    from pipeline.errors import ClusterError

    server, found = _found(target, address)
    if found is None:
        raise ClusterError(
            f"the cluster at {server.address} has no record of {target}; `pmet list` shows what it "
            "knows"
        )
    return server, found


def _warn(parcel: Parcel) -> None:
    """Print which paths must be on a disk that all nodes share."""
    if parcel.shared:
        err.print(
            "these paths must be on a disk that every node of the cluster shares:",
            style="yellow",
        )
        for key, path in parcel.shared:
            err.print(f"  {key}: {path}", style="yellow", markup=False, soft_wrap=True)


def _show(parcel: Parcel, python: str, fresh: bool) -> None:
    from jobs.submit.parcel import JOB_FILE
    from jobs.submit.submission import entrypoint, stem_of

    out.print(parcel.files[JOB_FILE].decode(), markup=False, soft_wrap=True)
    out.print(f"submission  {stem_of(parcel.job.output)}-N", markup=False, soft_wrap=True)
    out.print(f"entrypoint  {entrypoint(python, fresh=fresh)}", markup=False, soft_wrap=True)
    out.print(f"travels     {', '.join(parcel.files)}", markup=False, soft_wrap=True)


def _say(text: str) -> None:
    typer.echo(text, nl=False)
