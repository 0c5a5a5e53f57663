"""``python -m jobs.schedule.tied PARENT PROGRAM …``: a program that does not outlive its parent.

A runner that is killed cannot stop its night, and another runner would soon begin the same one.
So the kernel is asked to send SIGTERM when the parent ends; the request survives the ``exec``.
Only Linux knows it; elsewhere the program is simply started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program."""
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(parent):
            sys.exit("the runner has ended before its night began")
    os.execvp(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main()
