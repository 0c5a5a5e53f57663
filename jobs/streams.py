"""Standard output and standard error that never fail on write.

A closed pager, a lost terminal or a character that the encoding lacks must not end a run.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO})
_STRICT = ("strict", "surrogateescape")


class _Output(io.FileIO):
    """A file descriptor that is redirected to the null device once a write fails.

    Attributes:
        lost: the error that lost output; None if all was written or the reader closed the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest):
                written = super().write(rest)
                if written is None:
                    # Another process made the descriptor non-blocking.
                    select.select([], [self.fileno()], [])
                rest = rest[written or 0 :]
        except OSError as error:
            if error.errno not in _GONE:
                self.lost = error
            _lead_nowhere(self.fileno())
        return size


def protect() -> None:
    """Make this process's stdout and stderr survive a closed pipe and any character."""
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            _open_if_closed(descriptor)
    sys.stdout = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _protected(sys.stderr, sys.__stderr__, 2)


def finish() -> OSError | None:
    """Flush both streams; return the error that lost output, or None."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    lost: OSError | None = getattr(getattr(buffer, "raw", buffer), "lost", None)
    return lost


def _protected(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        # The descriptor was closed when the process started.
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Output(descriptor)
    errors = "backslashreplace" if stream.errors in _STRICT else stream.errors
    return io.TextIOWrapper(
        # PYTHONUNBUFFERED asks for unbuffered output.
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_if_closed(descriptor: int) -> None:
    """Open a closed standard descriptor, so that no other file takes its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        _lead_nowhere(descriptor)


def _lead_nowhere(descriptor: int) -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
