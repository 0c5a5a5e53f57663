"""Turns a failed command's exception into one message on standard error and an exit status.

Tracebacks are for developers: they go to a file, or to standard error if the environment variable
``PMET_TRACEBACK`` is set.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress

from rich.console import Console

from pipeline.cluster import signals

SHOW = "PMET_TRACEBACK"
"""Environment variable: show tracebacks on standard error."""
_LONGEST = 600
_AGAIN = "run the same command again"
_ON_CLUSTER = f"the submitted run continues; {_AGAIN} to follow it"
_GO_ON = {
    "run": f"{_AGAIN} to resume",
    "refresh": f"{_AGAIN} to resume",
    "statistics": f"{_AGAIN} to resume",
    "submit": _ON_CLUSTER,
    "logs": _ON_CLUSTER,
}
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

err = Console(stderr=True, highlight=False)


def explain(error: BaseException, command: str) -> int:
    """Print why a command ended and return its exit status.

    Args:
        error: the exception that ended it.
        command: name of the command, such as ``run`` or ``facts check``.
    """
    # Code that a signal interrupts may raise an error of its own.
    stopped = signals.first()
    if isinstance(error, signals.Stopped):
        stopped = error.signal
    elif isinstance(error, KeyboardInterrupt):
        stopped = stopped or signal.SIGINT
    elif isinstance(error, SystemExit) and stopped is None:
        return _status_of(error)
    if stopped is not None:
        how = "interrupted" if stopped is signal.SIGINT else f"stopped by {stopped.name}"
        _say(f"{how}; {_GO_ON.get(command, _AGAIN)}", style="yellow")
        return signals.EXIT_BASE + stopped
    text, status = _sentence(error, command)
    _say(f"pmet: {text}")
    return status


def explain_lost_output(error: OSError, command: str) -> int:
    """Print that a command succeeded but its output was lost; return the exit status."""
    _say(
        f"pmet: the output of `pmet {command}` could not be written ({error.strerror}); the "
        "command itself succeeded: send its output elsewhere"
    )
    return 1


def hook() -> None:
    """Keep tracebacks of threads and destructors off the terminal."""
    threading.excepthook = _of_thread
    sys.unraisablehook = _unraisable


def _sentence(error: BaseException, command: str) -> tuple[str, int]:
    # If nothing has imported pmet.errors, the error is not one of ours.
    ours = sys.modules.get("pmet.errors")
    if ours is not None and isinstance(error, ours.PMETError):
        return str(error), 2 if isinstance(error, ours.InputError) else 1
    where = _kept_traceback(error)
    if isinstance(error, MemoryError):
        return (
            f"`pmet {command}` ran out of memory ({_named(error)}); free some or use a larger "
            f"machine, then {_AGAIN}{where}"
        ), 1
    if isinstance(error, OSError) and error.errno is not None:
        return f"`pmet {command}` failed: {_os_error(error)}{where}", 1
    return (
        f"`pmet {command}` failed unexpectedly: {_named(error)}. This is a bug in pmet: please "
        f"report it with its traceback{where}"
    ), 1


def _os_error(error: OSError) -> str:
    said = error.strerror or os.strerror(error.errno or 0)
    file = f": {error.filename}" if error.filename else ""
    remedy = "make room there" if error.errno in _FULL else "fix that"
    return f"{said}{file}; {remedy}, then {_AGAIN}"


def _kept_traceback(error: BaseException) -> str:
    """Write a traceback to a file; return text that says where it is."""
    text = "".join(traceback.format_exception(error))
    if os.environ.get(SHOW):
        _say(text.rstrip())
        return ""
    with suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="pmet-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return f" (traceback: {path})"
    return f" (set {SHOW}=1 to see the traceback)"


def _named(error: BaseException) -> str:
    """Return an exception's type and text on one line."""
    text = ""
    with suppress(Exception):
        text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _status_of(error: SystemExit) -> int:
    if isinstance(error.code, str):
        _say(f"pmet: {error.code}")
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _of_thread(args: threading.ExceptHookArgs) -> None:
    error = args.exc_value
    if error is None or isinstance(error, SystemExit):
        return
    name = args.thread.name if args.thread else "?"
    _say(f"pmet: warning: thread {name} failed: {_named(error)}{_kept_traceback(error)}")


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    """Hide what destructors raise: it means nothing to users. A lost signal is sent again."""
    if os.environ.get(SHOW):
        sys.__unraisablehook__(args)


def _say(text: str, style: str = "red") -> None:
    err.print(text, style=style, markup=False, soft_wrap=True)
