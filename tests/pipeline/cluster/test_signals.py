"""Signals stop a process once and cleanly, wherever they arrive."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from pipeline.cluster import signals
from pipeline.cluster.signals import STOPPING, Stopped, deferred, kept
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def default_dispositions() -> Iterator[None]:
    """Have no signal ignored, as nohup and shells do with processes in the background."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Install a command's handlers in place of pytest's.

    A stop that is no longer being handled is delivered again, so tests call `signals.end` while
    they hold the exception, as a command does.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    signals.install()
    yield
    signals.end()
    # Later tests in this process are not stopped by the signals of these.
    signals._handlers = None
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_first_signal_decides_and_later_ones_let_the_end_be(
    handlers: None, number: str, status: int
) -> None:
    put_down = []

    def work() -> None:
        try:
            signal.raise_signal(signal.Signals[number])
        finally:
            for later in STOPPING:
                signal.raise_signal(later)
            put_down.append("work")

    with pytest.raises(Stopped) as caught:
        work()
    signals.end()
    assert (caught.value.code, signals.first()) == (status, signal.Signals[number])
    assert put_down == ["work"]


class Destructor:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def in_a_destructor() -> None:
    Destructor()


def in_code_that_catches_everything() -> None:
    with suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("lose", [in_a_destructor, in_code_that_catches_everything])
def test_a_signal_that_is_lost_comes_again(
    handlers: None, monkeypatch: pytest.MonkeyPatch, lose: Callable[[], None]
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    lose()
    with pytest.raises(Stopped) as caught:
        time.sleep(10)
    signals.end()
    assert caught.value.code == 143


def test_a_block_that_must_end_ends_first(handlers: None) -> None:
    written = []

    def write() -> None:
        with deferred():
            signal.raise_signal(signal.SIGINT)
            with deferred():
                time.sleep(3 * signals._AGAIN_S)
            written.append("run.json")

    with pytest.raises(Stopped) as caught:
        write()
    signals.end()
    assert caught.value.code == 130
    assert written == ["run.json"]


def test_nothing_is_deferred_without_handlers_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_handlers", None)
    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.install()
        signal.raise_signal(signal.SIGHUP)
        assert signals.first() is None
    finally:
        signals.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_outlive_a_library_that_removes_them(handlers: None) -> None:
    """Block signals from a thread for a second, as Ray does while it shuts down."""
    remove = ctypes.pythonapi.PyOS_setsig

    def end() -> None:
        with kept():
            remove(int(signal.SIGTERM), None)
            removed.set()
            go_on.wait(10)

    removed, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=end)
    thread.start()
    removed.wait(10)
    time.sleep(0.1)
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    signals.end()
    assert caught.value.code == 143
    go_on.set()
    thread.join()


def test_what_does_not_end_is_ended() -> None:
    script = """
import os, signal, time
from pipeline.cluster import signals
signals._GIVE_UP_S = 0.5
signals.install()
def stay():
    while True:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException:
            pass
# The signal comes again and again, and may find the inner loop between two of its blocks.
while True:
    try:
        stay()
    except BaseException:
        pass
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == 143
    assert b"could not shut down cleanly" in ended.stderr
