"""The channel for events of a run: retries, deaths, warnings.

One call, ``event(kind, text, shard=…, attempt=…)``, reaches the progress display, the log lines,
the metrics and ``run.json``. Kind and fields are for programs, the text is for people.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol


class EventKind(StrEnum):
    """The kind of an event; the values appear in ``run.json``, log lines and metrics."""

    NOTE = "note"
    """Information only."""
    WARNING = "warning"
    """The run continues, but its result may not be what the user wants."""
    WAITING = "waiting"
    """The cluster has no room yet."""
    RETRY = "retry"
    """A task or an update failed and is retried."""
    FAILED = "failed"
    """A task failed as often as is allowed."""
    TIMEOUT = "timeout"
    """A task took too long, and its worker was ended."""
    DEATH = "death"
    """A worker's process ended."""
    START_FAILURE = "start-failure"
    """A worker did not start."""
    ISOLATED = "isolated"
    """A request that makes its shard fail was set aside."""


class StageName(StrEnum):
    """The stages of a run, as progress, metrics and ``run.json`` name them."""

    PLAN = "plan"
    TEMPLATES = "templates"
    SECOND_MOMENTS = "second moments"
    KNOWN_BEFORE = "known before"
    TARGETS = "targets"
    MEASURE_BEFORE = "measure before"
    HARNESS_BEFORE = "harness before"
    UPDATE = "update"
    PUBLISH = "publish"
    MEASURE_AFTER = "measure after"
    HARNESS_AFTER = "harness after"
    KNOWN_AFTER = "known after"


CHECK, MEASURE, ASK = "check moments", "measure", "ask"
"""Work shown like a stage: the check of second moments, `pmet evaluate`, asking for known facts."""
HARNESS = "harness"
"""Work shown like a stage: tasks of lm-evaluation-harness in `pmet evaluate`."""
CHECK_WEIGHTS, CHECK_MODEL = "check weights", "check model"
"""Work shown like a stage: what `pmet apply` and `pmet revert` check before they write."""
FACTOR = "factor"
"""Work shown like a stage: the low-rank factors that `pmet export` computes."""
TRIALS, JUDGE = "trials", "judge"
"""Work shown like a stage: the trial edits of `pmet tune`, in seconds, and those it judges by."""
TRACE, COMPARE = "trace", "compare"
"""Work shown like a stage: the traces of `pmet inspect`, and the states that it compares."""
PUSH = "push"
"""Work shown like a stage: what `pmet push` uploads."""
UNITS: dict[str, str] = {
    CHECK: "layers",
    CHECK_WEIGHTS: "tensors",
    FACTOR: "layers",
    TRIALS: "s",
    JUDGE: "edits",
    TRACE: "facts",
    COMPARE: "facts",
    PUSH: "MB",
    MEASURE: "tokens",
    HARNESS: "requests",
    ASK: "facts",
    StageName.SECOND_MOMENTS: "tokens",
    StageName.KNOWN_BEFORE: "requests",
    StageName.TARGETS: "requests",
    StageName.MEASURE_BEFORE: "tokens",
    StageName.HARNESS_BEFORE: "requests",
    StageName.UPDATE: "layers",
    StageName.PUBLISH: "MB",
    StageName.MEASURE_AFTER: "tokens",
    StageName.HARNESS_AFTER: "requests",
    StageName.KNOWN_AFTER: "requests",
}
"""What the progress of a stage counts. Tokens of a measurement are estimated."""


class OnEvent(Protocol):
    """Receives events."""

    def __call__(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """Handle an event.

        Args:
            kind: the kind of the event.
            text: what happened, for people.
            shard: the name of the shard concerned, for example ``00007``.
            attempt: the number of the attempt at the shard or stage, from 1.
        """


def ignore(
    kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
) -> None:
    """Ignore an event."""
