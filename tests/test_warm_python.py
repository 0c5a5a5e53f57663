"""Processes that are forked from a warm Python end, and are ended, as others are."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import COLD
from tests.e2e.conftest import wait_until

pytestmark = pytest.mark.skipif(COLD in os.environ, reason=f"{COLD}: all processes start cold")


def started(warm_python: str, code: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [warm_python, "-c", code, "a", "b c"],
        cwd=folder,
        env=os.environ | more,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_has_the_arguments_environment_folder_and_streams_of_its_client(
    warm_python: str, tmp_path: Path
) -> None:
    code = (
        "import os, sys; warm = 'torch' in sys.modules; "
        "print(sys.argv[1:], os.environ['NAMED'], os.getcwd(), warm, input()); sys.exit(3)"
    )
    process = started(warm_python, code, tmp_path, NAMED="ü")
    out, err = process.communicate("said\n", timeout=60)
    assert (out, err) == (f"['a', 'b c'] ü {tmp_path} True said\n", "")
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("import sys; sys.exit('sorry')", 1, "sorry"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_the_client_ends_as_it_does(
    warm_python: str, tmp_path: Path, code: str, status: int, said: str
) -> None:
    process = started(warm_python, code, tmp_path)
    assert said in process.communicate(timeout=60)[1]
    assert process.returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_is_sent_the_signals_of_its_client(
    warm_python: str, tmp_path: Path, number: signal.Signals
) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = started(warm_python, code, tmp_path)
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == -number
    wait_until(lambda: not psutil.pid_exists(forked), within_s=30, every_s=0.05)
