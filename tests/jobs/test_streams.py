"""Output that cannot be written, and the resulting exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.jobs.test_facts_cli import OLD, parquet


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run ``pmet facts diff`` in its own process, through a shell."""
    (tmp_path / "old.parquet").write_bytes(parquet(OLD))
    (tmp_path / "new.parquet").write_bytes(parquet([("Köln", "länd", "日本"), *OLD]))

    def run(redirected: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        command = f"'{sys.executable}' -m jobs facts diff old.parquet new.parquet {redirected}"
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    "redirected",
    ["| true", "2>&1 | head -c 1 >/dev/null", "<&- >&- 2>&-"],
)
def test_a_command_whose_reader_is_gone_succeeds(
    check: Callable[..., subprocess.CompletedProcess[bytes]], redirected: str
) -> None:
    ended = check(redirected)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_output_that_a_disk_has_no_room_for_is_not_lost_silently(
    check: Callable[..., subprocess.CompletedProcess[bytes]],
) -> None:
    ended = check("> /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.startswith(
        b"pmet: the output of `pmet facts diff` could not be written (No space left on device)"
    )
    assert ended.stderr.count(b"\n") == 1
    # If even the message cannot be written, only the exit status remains.
    assert check("> /dev/full 2> /dev/full").returncode == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "no-such"},
        {"PYTHONIOENCODING": "ascii", "COLUMNS": "40", "PYTHONUNBUFFERED": "1"},
    ],
)
def test_any_encoding_shows_what_there_is(
    check: Callable[..., subprocess.CompletedProcess[bytes]], environment: dict[str, str]
) -> None:
    ended = check("", **environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"K\\xf6ln" in ended.stdout or "Köln".encode("latin-1") in ended.stdout
    assert b"\\u65e5" in ended.stdout
