"""Why work failed: a one-line text for people, and a kind for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

MEMORY_OF_WORKERS = "lower targets.batch_size or targets.workers"
"""How to reduce the memory used on the machines that compute targets."""
MEMORY_OF_RANKS = "raise update.ranks on more machines, or give them more memory"
"""How to reduce the memory used by each process of an update."""


class FailureKind(Enum):
    """The kind of a failure, which decides how it is handled."""

    OTHER = auto()
    STORAGE = auto()
    """A file could not be read or written; every worker is affected alike."""
    MEMORY = auto()
    """Memory ran out, or the process was killed, as the kernel does when memory runs out."""


@dataclass(frozen=True)
class Failure:
    """Why a task failed.

    Attributes:
        text: the root cause in one line: exception type, message, last traceback line.
        kind: decides how the failure is handled.
    """

    text: str
    kind: FailureKind = FailureKind.OTHER

    def __str__(self) -> str:
        return self.text


def remedy(kinds: Iterable[FailureKind], memory: str) -> str:
    """The end of a message about failures of these kinds.

    Args:
        kinds: the kinds of what failed.
        memory: what to do if memory ran out.
    """
    if FailureKind.MEMORY in kinds:
        return f"{memory} if memory is short, and run the same job again"
    return "remove the cause and run the same job again"
