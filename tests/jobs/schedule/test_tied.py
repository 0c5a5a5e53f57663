"""Programs that do not outlive their parent."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT

PARENT = """
import os, subprocess, sys
tied = [sys.executable, "-m", "jobs.schedule.tied", str(os.getpid())]
subprocess.Popen([*tied, "sh", "-c", "echo $$; exec sleep 600"], start_new_session=True).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_parent_takes_it_along() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_not_begun_for_a_parent_that_has_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.schedule.tied", "1234567", "echo", "begun"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if sys.platform == "linux":
        assert (done.returncode, done.stdout) == (1, "")
        assert "the runner ended before its run started" in done.stderr
