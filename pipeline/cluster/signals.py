"""Signals that ask a process to stop: SIGINT, SIGTERM and SIGHUP.

The first one raises `Stopped` in the main thread, so that what is under way ends in good order:
``run.json`` says so, workers end, the lease is released. Later ones are ignored while that goes
on. Code in between may lose the exception (a destructor, a library that catches everything); the
signal is then delivered again. What has not ended after 45 seconds, a library that waits for a
process which is gone, is ended as it is.

A signal that is ignored when the process starts stays ignored, as ``nohup`` asks for.
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
"""What a shell adds to the number of a signal."""
_AGAIN_S = 0.2
_GIVE_UP_S = 45.0
_RESTORE_S = 0.002
_GIVEN_UP = b"pmet: stopped by a signal; it could not end in good order within 45 s\n"

_c_handler = ctypes.pythonapi.PyOS_getsig
_c_handler.argtypes, _c_handler.restype = [ctypes.c_int], ctypes.c_void_p
_set_c_handler = ctypes.pythonapi.PyOS_setsig
_set_c_handler.argtypes, _set_c_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p


class Stopped(SystemExit):
    """A signal has asked this process to stop; ``code`` is the exit status that a shell shows.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_BASE + number)
        self.signal = signal.Signals(number)


class _Handlers:
    """What the handlers of this process share.

    Attributes:
        first: the signal that came first.
        ended: whether signals mean nothing any more.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._raised: weakref.ref[Stopped] | None = None
        self._deferred = 0
        self.ended = False
        # Unlike an event it may be used by a signal handler, whatever this thread is doing.
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
        """Whether the exception is on its way: it lives as long as it is being handled."""
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
    """Have the signals that ask this process to stop raise `Stopped`; call it in the main thread.

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
    """The signal that asked this process to stop, the first of several; None without one."""
    if _handlers is None or _handlers.first is None:
        return None
    return signal.Signals(_handlers.first)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a ``with`` block come to its end; a signal that arrives in it raises afterwards."""
    if _handlers is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handlers.deferred():
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Keep the handlers that this process has while a library in C replaces them in a block.

    It may run in any thread, where Python itself sets no handler.
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
