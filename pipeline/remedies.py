"""What to do about a failure of workers or ranks, as far as its reason tells."""

from __future__ import annotations

MEMORY_OF_WORKERS = "lower targets.batch_size or targets.workers"
"""How a job asks less memory of the machines that compute targets."""
MEMORY_OF_RANKS = "raise update.ranks on more machines, or give them more memory"
"""How each process of an update gets by with less."""
_WANT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "SIGKILL", "allocate memory")


def remedy(reason: str, memory: str) -> str:
    """The end of a message: ``memory`` says what to do where that may have been short."""
    if any(sign in reason for sign in _WANT_OF_MEMORY):
        return f"{memory} if memory is short, and run the same job again"
    return "remove the cause and run the same job again"
