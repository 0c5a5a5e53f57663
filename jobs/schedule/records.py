"""Records of the store: schedules and their attempts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from jobs.schedule.cron import check_cron, check_timezone
from pipeline.errors import ScheduleError

# A DNS label, so that it can name Kubernetes objects; KubeRay adds a suffix and allows 47.
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
        """Return the record as file content: indented JSON in UTF-8."""
        return self.model_dump_json(indent=2).encode() + b"\n"


class Schedule(_Record):
    """A schedule: what to refresh, and when.

    Attributes:
        name: lower-case letters, digits and hyphens, at most 36.
        refresh: the refresh file, an absolute path or a URL.
        cron: cron expression with five fields.
        timezone: IANA name of the expression's time zone.
        directory: working folder of the refresh, the base of its relative paths; None: that of the
            runner.
        catch_up: whether one run makes up for all missed ones.
        retries: number of retries after a failed run.
        enabled: whether runs are due at all.
        added_at: when it was added.
        since: due times up to this one are ignored.
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
        due: its due time, the latest of ``covers``.
        covers: the due times that it covers, oldest first; only the latest if there are very many.
        attempt: 1 for the first attempt at this due time.
        host: host name of the machine.
        pid: process id of the runner there.
        started: start time.
        finished: end time; None while it runs, or if its end was not observed.
        exit_status: exit status of the refresh, or minus the signal that killed it.
        outcome: how it ended.
        log: name, in the store, of the file with the output; None if nothing was started.
        output: last lines of the output.
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
        """The outcome, with the exit status if that adds information."""
        if self.outcome != "failed" or self.exit_status is None:
            return self.outcome
        if self.exit_status < 0:
            return f"failed (killed by signal {-self.exit_status})"
        return f"failed (exit status {self.exit_status})"


def make_schedule(**values: object) -> Schedule:
    """Make a schedule from user input.

    Raises:
        ScheduleError: some values are invalid; the message has a sentence for each.
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
            f"{error['input']!r} is not a valid schedule name; use lower-case letters, digits and "
            "hyphens, a letter first, at most 36"
        )
    if field == "catch_up":
        return f"--catch-up: {error['input']!r} is neither once nor never"
    return f"{field}: {message}"
