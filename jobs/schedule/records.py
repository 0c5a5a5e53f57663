"""What the store holds: schedules, and what each night did."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs.schedule.cron import check_cron, check_timezone
from pipeline.errors import ScheduleError

# A label of the DNS, so that it can name Kubernetes objects; KubeRay adds to it and allows 47.
NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,34}[a-z0-9])?$"
MAX_RETRIES = 10

Outcome = Literal[
    "running", "done", "held back", "bad input", "failed", "interrupted", "died", "left out"
]
CatchUp = Literal["once", "never"]


def _cron(text: str) -> str:
    try:
        return check_cron(text)
    except ScheduleError as error:
        raise ValueError(str(error)) from None


def _timezone(name: str) -> str:
    try:
        return check_timezone(name)
    except ScheduleError as error:
        raise ValueError(str(error)) from None


TimeZone = Annotated[str, AfterValidator(_timezone)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        """The record as a file holds it: indented, in UTF-8."""
        return self.model_dump_json(indent=2).encode() + b"\n"


class Schedule(_Record):
    """What is refreshed, and when.

    Attributes:
        name: lower-case letters, digits and hyphens, at most 36.
        refresh: the refresh file, an absolute path or a URL.
        cron: five fields.
        timezone: IANA name of the zone that the fields are meant in.
        directory: where the refresh runs, which its relative paths start from; None: wherever
            the runner was started.
        catch_up: whether nights that nobody ran in time are made up, all by one.
        retries: how often a night that failed is tried again.
        enabled: whether nights are due at all.
        added_at: when it was added.
        since: due times up to this one do not count.
    """

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    refresh: Annotated[str, Field(min_length=1)]
    cron: Annotated[str, AfterValidator(_cron)]
    timezone: TimeZone = "UTC"
    directory: str | None = None
    catch_up: CatchUp = "once"
    retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 1
    enabled: bool = True
    added_at: AwareDatetime
    since: AwareDatetime


class Night(_Record):
    """One attempt at one due time. All times are UTC.

    Attributes:
        schedule: name of the schedule.
        due: when it was due: the latest of ``covers``.
        covers: the due times that it stands for, the oldest first; of very many the latest.
        attempt: 1 for the first one at this due time.
        host: the machine.
        pid: number of the runner's process there.
        started: when.
        finished: when; None while it runs, and where its end was not seen.
        exit_status: what the refresh exited with, or minus the signal that killed it.
        outcome: in words.
        log: name of the file in the store that has the output; None if nothing was started.
        output: its last lines.
    """

    schedule: Annotated[str, Field(pattern=NAME_PATTERN)]
    due: AwareDatetime
    covers: tuple[AwareDatetime, ...]
    attempt: Annotated[int, Field(ge=1)]
    host: str
    pid: int
    started: AwareDatetime
    finished: AwareDatetime | None = None
    exit_status: int | None = None
    outcome: Outcome = "running"
    log: str | None = None
    output: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The outcome, and the exit status where it says more."""
        if self.outcome != "failed" or self.exit_status is None:
            return self.outcome
        if self.exit_status < 0:
            return f"failed (killed by signal {-self.exit_status})"
        return f"failed (exit status {self.exit_status})"


def make_schedule(**values: object) -> Schedule:
    """A schedule of what a user gave.

    Raises:
        ScheduleError: with a sentence for each value that cannot be used.
    """
    try:
        return Schedule.model_validate(values)
    except ValidationError as error:
        raise ScheduleError("\n".join(map(_problem, error.errors()))) from None


def _problem(error: object) -> str:
    assert isinstance(error, dict)
    field, message = str(error["loc"][0]), str(error["msg"])
    if error["type"] == "value_error":
        return message.removeprefix("Value error, ")
    if field == "name":
        return (
            f"{error['input']!r} is no name for a schedule; use lower-case letters, digits and "
            "hyphens, a letter first, at most 36"
        )
    if field == "catch_up":
        return f"--catch-up: {error['input']!r} is neither once nor never"
    return f"{field}: {message}"
