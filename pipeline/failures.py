"""Why work failed: one line for people, and a kind for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

MEMORY_OF_WORKERS = "lower targets.batch_size or targets.workers"
"""How a job asks less memory of the machines that compute targets."""
MEMORY_OF_RANKS = "raise update.ranks on more machines, or give them more memory"
"""How a job asks less memory of each process of an update."""


class FailureKind(Enum):
    """What decides how a failure is handled."""

    OTHER = auto()
    STORAGE = auto()
    """A file could not be read or written, on every worker alike."""
    MEMORY = auto()
    """Memory was short, or the process was killed, as the kernel does when memory is short."""


@dataclass(frozen=True)
class Failure:
    """Why a task failed.

    Attributes:
        text: the root cause in one line: exception type, message, last traceback line.
        kind: what decides how it is handled.
    """

    text: str
    kind: FailureKind = FailureKind.OTHER

    def __str__(self) -> str:
        return self.text


def remedy(kinds: Iterable[FailureKind], memory: str) -> str:
    """The end of a message about failures of these kinds.

    Args:
        kinds: the kinds of what failed.
        memory: what to do where memory was short.
    """
    if FailureKind.MEMORY in kinds:
        return f"{memory} if memory is short, and run the same job again"
    return "remove the cause and run the same job again"
