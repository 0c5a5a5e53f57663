"""A Python that has already imported what a worker needs: for tests that start many processes.

To import torch, transformers and DeepSpeed takes most of the time of a small process, and of the
whole suite. A *server* imports them once, and forks for each process that is asked of it; a
*client* is run where ``python`` would be, and asks. The new process has the client's arguments,
environment, folder and streams. It is sent the signals that the client is sent, and the client ends
as it does. But it is no child of the client, and the system shows the server's environment.

python warm_python.py SOCKET PID ARGUMENT…    the client, in place of ``python ARGUMENT…``
python warm_python.py --serve SOCKET PID      the server, until the process PID has ended

Only the standard library is imported by the client, which starts in a hundredth of a second.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

WARM = (
    "torch",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gptj.modeling_gptj",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "deepspeed",
    "pyarrow.dataset",
    "jobs.cli",
    "pipeline.run",
    "pipeline.workers.worker",
    "pipeline.zero.rank",
)
_PATIENCE_S = 120.0
_TICK_S = 0.05


def executable(folder: Path) -> Path:
    """Write a program to run in place of ``python``; its server ends with this process."""
    program, place = folder / "warm-python", folder / "warm"
    command = f'exec "{sys.executable}" -I -S "{__file__}" "{place}" {os.getpid()} "$@"\n'
    program.write_text(f"#!/bin/sh\n{command}")
    program.chmod(0o755)
    return program


def _ask(place: str, owner: str, arguments: list[str]) -> int:
    """Run a process; return its exit status."""
    with _connected(place, owner) as connection:
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        streams = array.array("i", (0, 1, 2))
        message = json.dumps(asked).encode(errors="surrogateescape")
        connection.sendmsg(
            [len(message).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        )
        connection.sendall(message)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        ended = connection.recv(8)
    # Without an answer the server has been killed, and the process with it.
    status = int(ended or -signal.SIGKILL)
    if status < 0:
        with contextlib.suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _connected(place: str, owner: str) -> socket.socket:
    """A connection to the server, which the first client starts."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(place)
        except OSError:
            connection.close()
            _start(place, owner)
            time.sleep(_TICK_S)
        else:
            return connection
    raise TimeoutError(f"no server at {place}")


def _start(place: str, owner: str) -> None:
    try:
        os.close(os.open(f"{place}.started", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    # One thread: sums have one order, and a process with several threads cannot be forked.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    with open(f"{place}.log", "wb") as log:
        subprocess.Popen(
            [sys.executable, __file__, "--serve", place, owner],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


class _Server:
    """Forks a process for each client.

    Args:
        place: of its socket.
        owner: the process that it serves; it ends with that.
    """

    def __init__(self, place: str, owner: int) -> None:
        self._owner = owner
        self._clients: dict[int, socket.socket] = {}
        for name in WARM:
            __import__(name)
        assert "ray" not in sys.modules, "it reads the environment when it is imported"
        self._path = sys.path[1:]  # without the folder of this file
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(f"{place}.new")
        self._listening.listen(64)
        self._listening.settimeout(_TICK_S)
        os.rename(f"{place}.new", place)

    def run(self) -> None:
        # Imported here: the client does without.
        import psutil

        while psutil.pid_exists(self._owner):
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listening.accept()
                self._fork(connection)
            self._reap()
            self._pass_on_signals()
        for process in self._clients:
            os.kill(process, signal.SIGKILL)

    def _fork(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        length, streams, *_ = socket.recv_fds(connection, 8, 3)
        size, message = int.from_bytes(length, "big"), b""
        while len(message) < size:
            message += connection.recv(size - len(message))
        if process := os.fork():
            self._clients[process] = connection
            for stream in streams:
                os.close(stream)
            return
        self._listening.close()
        for other in (connection, *self._clients.values()):
            other.close()
        for own, stream in enumerate(streams):
            os.dup2(stream, own)
            os.close(stream)
        self._become(json.loads(message.decode(errors="surrogateescape")))

    def _become(self, asked: dict[str, Any]) -> NoReturn:
        os.setpgid(0, 0)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        arguments = asked["arguments"]
        first, *rest = arguments
        while first in ("-u", "-P"):
            first, *rest = rest
        of_option = first in ("-m", "-c")
        folder = os.getcwd() if of_option else str(Path(first).resolve().parent)
        sys.path[:] = [folder, *(str(Path(entry).resolve()) for entry in given if entry)]
        sys.path += self._path
        sys.argv = ["-c", *rest[1:]] if first == "-c" else rest if of_option else [first, *rest]
        os._exit(_run(first, rest))

    def _reap(self) -> None:
        while self._clients:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            client = self._clients.pop(process)
            with contextlib.suppress(OSError):
                client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            client.close()

    def _pass_on_signals(self) -> None:
        """Send processes the signals that their clients were sent."""
        for process, client in self._clients.items():
            client.setblocking(False)
            try:
                # Nothing is left of a client that was killed.
                numbers = client.recv(8) or bytes([signal.SIGKILL])
            except BlockingIOError:
                continue
            except OSError:
                numbers = bytes([signal.SIGKILL])
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)


def _run(first: str, rest: list[str]) -> int:
    """Run a module, code or a file as the main program; return the exit status."""
    import atexit
    import runpy
    import traceback

    status = 0
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            exec(rest[0], {"__name__": "__main__"})
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
        status = 1 if isinstance(ended.code, str) else int(ended.code or 0)
    except BaseException:  # noqa: BLE001  as at the end of any program
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return status


def main() -> None:
    if sys.argv[1] == "--serve":
        _Server(sys.argv[2], int(sys.argv[3])).run()
    else:
        place, owner, *arguments = sys.argv[1:]
        sys.exit(_ask(place, owner, arguments))


if __name__ == "__main__":
    main()
