"""This process: its environment, its threads, and descriptions of the errors it raises.

Nothing here needs Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import traceback
from collections.abc import Iterator, Mapping

from pipeline.errors import StorageError
from pipeline.failures import Failure, FailureKind

OUT_OF_MEMORY = frozenset({"MemoryError", "OutOfMemoryError"})
"""Names of the exceptions of Python, torch, Ray and pmet that mean memory is exhausted."""
LOCAL = "local"
"""The address that stands for a cluster started on this machine."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of a ``with`` block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def limit_threads(threads: int | None) -> int | None:
    """Set the number of threads that torch computes with; return the previous number.

    Does nothing, and returns None, if ``threads`` is None or torch is not installed.
    """
    if threads is None or importlib.util.find_spec("torch") is None:
        return None
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before


def cause_here(error: BaseException) -> Failure:
    """Describe an error of this process as a failure, with the last traceback line."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return failure_of(error, f"{last.filename}:{last.lineno} in {last.name}" if last else "")


def failure_of(error: BaseException, place: str) -> Failure:
    """Describe an error as a failure, with the place in the source where it arose."""
    message = one_line(str(error))
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return Failure(f"{text} ({place})" if place else text, _kind(error))


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, StorageError):
        return FailureKind.STORAGE
    # By name, not imported: this process does not need torch. Its CPU allocator raises a plain
    # RuntimeError, which only its message identifies.
    short = type(error).__name__ in OUT_OF_MEMORY or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
    return FailureKind.MEMORY if short else FailureKind.OTHER


def full_text(error: BaseException) -> str:
    """An error's full text, including the worker's traceback, without terminal colours."""
    return _ANSI.sub("", str(error)).strip()


def one_line(text: str, *, limit: int = 600) -> str:
    """The text with white space collapsed, cut to ``limit`` characters."""
    flat = " ".join(_ANSI.sub("", text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def named_cluster(address: str | None) -> str | None:
    """The cluster named by a call or the environment; None: one is started on this machine."""
    where = address or os.environ.get("RAY_ADDRESS") or LOCAL
    return None if where == LOCAL else where
