"""The command line, run in this process."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from jobs import cli, edits_cli, facts_cli, refresh_cli
from jobs.cli import main
from jobs.inspect import command as inspect_command
from pipeline.cluster.signals import STOPPING

Invoke = Callable[..., tuple[int, str, str]]


@contextmanager
def process_restored() -> Iterator[None]:
    """Restore the signal handlers and hooks that the command line replaces."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    hooks = threading.excepthook, sys.unraisablehook
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        threading.excepthook, sys.unraisablehook = hooks


@pytest.fixture
def pmet(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Invoke:
    """Run ``pmet`` with arguments; return exit status, output and error output.

    No Ray session is open at first: a job that finds one runs on it.
    """
    consoles = (cli.out, cli.err, edits_cli.out, facts_cli.out, refresh_cli.out)
    for console in (*consoles, inspect_command.out):
        monkeypatch.setattr(console, "width", 200)

    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pmet", *map(str, arguments)])
        status: Any = 0
        with process_restored():
            try:
                main()
            except SystemExit as exit_:
                status = exit_.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke
