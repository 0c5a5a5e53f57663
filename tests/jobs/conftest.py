"""The command line, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from jobs import cli, facts_cli, refresh_cli
from jobs.cli import main

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pmet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run ``pmet`` with arguments; returns exit status, output and error output."""
    for console in (cli.out, cli.err, facts_cli.out, refresh_cli.out):
        monkeypatch.setattr(console, "width", 200)

    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pmet", *map(str, arguments)])
        status: Any = 0
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke
