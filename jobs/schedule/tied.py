"""``python -m jobs.schedule.tied PARENT PROGRAM …``: run a program that its parent's death stops.

A killed runner cannot stop its run, and another runner would soon start the same one. So this asks
the kernel to send SIGTERM when the parent ends; the request survives ``exec``. Only Linux supports
this; elsewhere the program is simply started.
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
            sys.exit("the runner ended before its run started")
    os.execvp(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main()
