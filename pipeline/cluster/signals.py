"""Signals that ask a process to stop: SIGINT, SIGTERM and SIGHUP.

The first one raises `Stopped` in the main thread, so that the run shuts down cleanly:
``run.json`` records it, workers end, the lease is released. Later signals are ignored meanwhile.
Code in between may swallow the exception (a destructor, a library that catches everything); the
signal is then delivered again. If the process has not ended after 45 seconds, for example because
a library waits for a process that is gone, it is ended immediately.

A signal that is ignored when the process starts stays ignored, as ``nohup`` requests.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

STOPPING = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__
)
EXIT_BASE = 128
"""A shell adds this to the number of a signal to form the exit status."""
_AGAIN_S = 0.2
_GIVE_UP_S = 45.0
_RESTORE_S = 0.002
_GIVEN_UP = b"pmet: stopped by a signal; it could not shut down cleanly within 45 s\n"

_c_handler = ctypes.pythonapi.PyOS_getsig
_c_handler.argtypes, _c_handler.restype = [ctypes.c_int], ctypes.c_void_p
_set_c_handler = ctypes.pythonapi.PyOS_setsig
_set_c_handler.argtypes, _set_c_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p


class Stopped(SystemExit):
    """A signal has asked this process to stop; ``code`` is the exit status that a shell shows.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_BASE + number)
        self.signal = signal.Signals(number)


class _Handlers:
    """The state shared by the signal handlers of this process.

    Attributes:
        first: the signal that came first.
        ended: whether signals are ignored from now on.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._raised: weakref.ref[Stopped] | None = None
        self._deferred = 0
        self.ended = False
        # Unlike an event, it may be used in a signal handler at any point.
        self._queue: SimpleQueue[int] = SimpleQueue()

    def install(self) -> None:
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._deliver_again, name="signals", daemon=True).start()

    def end(self) -> None:
        self.ended = True
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        self._queue.put(0)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.first and not (self.ended or self._deferred or self._is_stopping()):
            self._raise()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.ended or self._is_stopping():
            return
        self.first = self.first or number
        self._queue.put(number)
        if not self._deferred:
            self._raise()

    def _raise(self) -> None:
        # No local name holds the exception: it would outlive its handling.
        raise self._new()

    def _new(self) -> Stopped:
        assert self.first is not None
        error = Stopped(self.first)
        self._raised = weakref.ref(error)
        return error

    def _is_stopping(self) -> bool:
        """Whether the exception is propagating: it exists as long as it is being handled."""
        return self._raised is not None and self._raised() is not None

    def _deliver_again(self) -> None:
        number, start = self._queue.get(), time.monotonic()
        while not self.ended:
            time.sleep(_AGAIN_S)
            if not self.ended and time.monotonic() - start > _GIVE_UP_S:
                os.write(2, _GIVEN_UP)
                os._exit(EXIT_BASE + number)
            if not (self.ended or self._deferred or self._is_stopping()):
                signal.pthread_kill(threading.main_thread().ident or 0, number)


_handlers: _Handlers | None = None


def install() -> None:
    """Make the signals that ask this process to stop raise `Stopped`; call it in the main thread.

    A second call does nothing until `end`.
    """
    global _handlers
    if _handlers is None or _handlers.ended:
        _handlers = _Handlers()
        _handlers.install()


def end() -> None:
    """Ignore these signals from now on: the exit status is decided, and the process is ending."""
    if _handlers is not None:
        _handlers.end()


def first() -> signal.Signals | None:
    """The first signal that asked this process to stop; None if there was none."""
    if _handlers is None or _handlers.first is None:
        return None
    return signal.Signals(_handlers.first)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a ``with`` block finish; a signal that arrives in it raises afterwards."""
    if _handlers is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handlers.deferred():
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Keep this process's handlers while a C library replaces them in a block.

    It may run in any thread, although Python itself cannot set handlers there.
    """
    before = {number: handler for number in STOPPING if (handler := _c_handler(number))}
    done = threading.Event()

    def restore() -> None:
        for number, handler in before.items():
            if _c_handler(number) != handler:
                _set_c_handler(number, handler)

    def watch() -> None:
        while not done.wait(_RESTORE_S):
            restore()

    thread = threading.Thread(target=watch, name="handlers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        restore()
