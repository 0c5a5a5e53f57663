"""Submissions: a run folder has one at a time, and its name identifies the folder.

The name is made of the run folder and the attempt number, so a job that is submitted twice runs
once: the second submission finds the first, or the cluster refuses it.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.submit.parcel import JOB_FILE, Parcel
from jobs.submit.server import ENDED, JobServer
from jobs.submit.state import read_state
from pipeline.errors import ClusterError, JobError, StorageError
from pipeline.run_folder import SUBMISSION
from pipeline.storage import now_text

NAME = re.compile(r"(?P<stem>pmet-[a-z0-9-]+-[0-9a-f]{10})-(?P<attempt>\d+)")
OUTPUT, DIGEST = "pmet_output", "pmet_job"
STOP_S = 60
"""Seconds that a run has to save its work after a request to stop."""
PATIENCE_S = 120.0
_POLL_S = 1.0
_OURS = (0, 1, 2, 3)
_SLUG = 24


@dataclass(frozen=True)
class Submission:
    """A job as the cluster knows it.

    Attributes:
        name: its submission id.
        attempt: attempt number at the end of its name.
        output: its run folder, without credentials.
        digest: digest of the uploaded job file.
        status: Ray's status: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED``, ``STOPPED``.
        exit_status: exit status of the run; None while it runs or if unknown.
        message: Ray's message about it.
        submitted_ms: submission time, in milliseconds since 1970.
    """

    name: str
    attempt: int
    output: str
    digest: str
    status: str
    exit_status: int | None
    message: str
    submitted_ms: int

    @classmethod
    def of(cls, job: Any) -> Submission | None:
        """Build a submission from Ray's description of a job; None if it is not one of ours."""
        found = NAME.fullmatch(job.submission_id or "")
        metadata = job.metadata or {}
        if found is None or OUTPUT not in metadata:
            return None
        status = str(getattr(job.status, "value", job.status))
        return cls(
            name=job.submission_id,
            attempt=int(found["attempt"]),
            output=metadata[OUTPUT],
            digest=metadata.get(DIGEST, ""),
            status=status,
            exit_status=_exit_status(status, job.driver_exit_code),
            message=job.message or "",
            submitted_ms=job.start_time or 0,
        )

    @property
    def ended(self) -> bool:
        """Whether the submission has ended."""
        return self.status in ENDED


def stem_of(output: str) -> str:
    """Return the common prefix of the names of a run folder's submissions."""
    if "://" not in output:
        output = str(Path(output).expanduser().absolute())
    output = output.rstrip("/")
    slug = re.sub(r"[^a-z0-9]+", "-", public(output).rpartition("/")[2].lower())
    slug = slug.strip("-")[:_SLUG].strip("-") or "run"
    return f"pmet-{slug}-{hashlib.sha256(output.encode()).hexdigest()[:10]}"


def public(url: str) -> str:
    """Return a URL without its secrets: user, password and query string."""
    return re.sub(r"(://)[^/]*@", r"\1", url).partition("?")[0]


def submissions(jobs: Iterable[Any]) -> list[Submission]:
    """Return our submissions among a cluster's jobs, latest first."""
    found = [ours for job in jobs if (ours := Submission.of(job)) is not None]
    return sorted(found, key=lambda s: (s.submitted_ms, s.attempt), reverse=True)


def latest_of(folder: str, server: JobServer) -> Submission | None:
    """Return the latest submission of a run folder that the cluster knows."""
    stem = stem_of(folder)
    ours = [s for s in submissions(server.jobs()) if s.name.rpartition("-")[0] == stem]
    return max(ours, key=lambda s: s.attempt, default=None)


def submit(
    parcel: Parcel, server: JobServer, *, fresh: bool = False, python: str = "python3"
) -> tuple[str, bool]:
    """Submit a job unless it is already running.

    Args:
        parcel: the packed job.
        server: the cluster's job server.
        fresh: make the run start over.
        python: Python interpreter on the cluster that has pmet.

    Returns:
        The name of the submission, and whether it is new.

    Raises:
        JobError: another job is writing this run folder.
        ClusterError: the cluster cannot be reached or refuses the job.
    """
    output, digest = parcel.job.output, hashlib.sha256(parcel.files[JOB_FILE]).hexdigest()
    earlier = latest_of(output, server)
    if earlier is not None and not earlier.ended:
        _refuse_another(earlier, digest, fresh=fresh)
        return earlier.name, False
    attempt = 1 + max(earlier.attempt if earlier else 0, _attempts_in(output))
    name = f"{stem_of(output)}-{attempt}"
    with tempfile.TemporaryDirectory() as folder:
        for file, data in parcel.files.items():
            Path(folder, file).write_bytes(data)
        new = server.submit(
            name,
            entrypoint(python, fresh=fresh),
            folder=Path(folder),
            environment={SUBMISSION: name, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
            metadata={OUTPUT: public(output), DIGEST: digest, "pmet_submitted": now_text()},
        )
    return name, new


def entrypoint(python: str, *, fresh: bool = False) -> str:
    """Return the command that runs a job on a cluster, in the uploaded folder."""
    command = [python, "-P", "-m", "jobs", "run", JOB_FILE, "--address", "auto", "--log-lines"]
    return shlex.join([*command, "--fresh"] if fresh else command)


def wait(
    server: JobServer,
    name: str,
    *,
    say: Callable[[str], None] | None = None,
    patience_s: float = PATIENCE_S,
) -> Submission:
    """Wait until a submission has ended.

    Args:
        server: the cluster's job server.
        name: name of the submission.
        say: called with its output; None: discard it.
        patience_s: seconds for which the cluster may be unreachable.

    Raises:
        ClusterError: the cluster can no longer be reached, or does not know the submission.
    """
    heard, shown = time.monotonic(), 0
    while True:
        try:
            if say is not None:
                shown = server.follow(name, say, shown)
            job = find(server, name)
            heard = time.monotonic()
            if job.ended:
                return job
        except ClusterError as error:
            if time.monotonic() - heard > patience_s:
                raise ClusterError(
                    f"{error}. The run itself may be fine: `pmet status RUN` reads its folder"
                ) from error
        time.sleep(_POLL_S)


def find(server: JobServer, name: str) -> Submission:
    """Return a submission by name.

    Raises:
        ClusterError: the cluster does not know it.
    """
    job = server.find(name)
    found = None if job is None else Submission.of(job)
    if found is None:
        raise ClusterError(
            f"the cluster at {server.address} has no record of {name}; a restarted head forgets "
            "earlier runs. `pmet list` shows the runs it knows, `pmet status RUN` reads "
            "the run folder"
        )
    return found


def hint(job: Submission) -> str | None:
    """Return the probable cause if a run could not start; None if unknown."""
    missing = ("No module named", ": not found")
    if job.status == "FAILED" and any(sign in job.message for sign in missing):
        return (
            "pmet is not installed in the Python that ran it: install it on every node, or name "
            "the interpreter that has it with --python"
        )
    return None


def _refuse_another(running: Submission, digest: str, *, fresh: bool) -> None:
    if fresh:
        raise JobError(
            f"{running.output} is being written by {running.name}; stop that first (pmet stop "
            f"{running.name}), then submit with --fresh"
        )
    if running.digest != digest:
        raise JobError(
            f"{running.output} is being written by {running.name}, which was submitted with other "
            "settings; wait until it ends, stop it, or name another output"
        )


def _attempts_in(output: str) -> int:
    """Return the number of attempts recorded in the run folder, if it can be read from here."""
    with suppress(StorageError):
        state = read_state(output)
        return 0 if state is None else int(state.run.get("attempt") or 0)
    return 0


def _exit_status(status: str, code: int | None) -> int | None:
    if status not in ENDED:
        return None
    if status == "SUCCEEDED":
        return 0
    # Statuses for signals, or from a shell that finds no such command, are not ours.
    return code if code in _OURS and code != 0 else 1
