"""The Ray cluster: a session on it, its size, the objects in its actors, and its errors.

Nothing here depends on what the workers compute.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as ray_exceptions

from pipeline.cluster import signals
from pipeline.cluster.local_ray import RAY_FOLDER, folder_for_ray, token
from pipeline.cluster.process import (
    LOCAL,
    cause_here,
    environment,
    failure_of,
    full_text,
    limit_threads,
    named_cluster,
    one_line,
)
from pipeline.cluster.ray_internals import (
    dashboard_address,
    folder_option,
    on_loopback,
    processes_in_own_session,
    reset_token,
    sigterm_untouched,
    started_here,
    without_agent,
    without_monitors,
)
from pipeline.cluster.shares import fit, fit_gpus
from pipeline.errors import WorkerError
from pipeline.failures import Failure, FailureKind
from pipeline.storage import libraries_environment

_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^/\]]+?)\]?:(?P<port>\d+)")
_KNOCK_S = 10.0
_PATIENCE = "RAY_gcs_server_port_wait_time_s"
_SILENT_END = "connection error code 2"
_MEMORY_USED = re.compile(r"was ([\d.]+\s*\w?B)(?: used)? / ([\d.]+\s*\w?B)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@contextlib.contextmanager
def ray_session(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[bool]:
    """Provide a Ray cluster during a ``with`` block; yields whether this process started it.

    If this process has already initialised Ray, that is used unchanged and left running. Otherwise
    the session joins the cluster at ``address``, or the one that the environment names in
    ``RAY_ADDRESS`` (as Ray does inside a submitted job), or starts one on this machine that
    listens only on the loopback interface. A cluster started or joined here is left on exit.

    Args:
        address: ``host:port``, ``auto``, ``ray://…`` or ``local``.
        num_cpus: logical CPUs of a cluster started here; all of the machine's if None.
        say: called with a sentence if a cluster started here keeps its files in another folder
            than the user would expect.

    Raises:
        StorageError: this machine has no folder for the files of a cluster started here.
        WorkerError: no cluster responds at the address, or none can be started.
    """
    if ray.is_initialized():
        yield started_here()
        return
    where = named_cluster(address) or LOCAL
    try:
        with _handlers_kept():
            _connect(where, num_cpus, say or _keep_silent)
    except (OSError, RuntimeError, ValueError) as error:
        _disconnect()
        raise WorkerError(_no_cluster(where, error), cause_text=str(error)) from error
    except BaseException:
        # A signal while Ray starts: some of its processes are already running.
        _disconnect()
        raise
    try:
        yield started_here()
    finally:
        _disconnect()
        reset_token()


def _no_cluster(where: str, error: Exception) -> str:
    reason = one_line(str(error))
    if where == LOCAL:
        return (
            f"Ray cannot be started on this machine: {reason}; if it lacks a writable folder with "
            f"enough space, set {RAY_FOLDER} to one, or name a running cluster with --address "
            "host:port"
        )
    return (
        f"Ray cannot be reached at {where!r}: {reason}; name a running cluster "
        f"as host:port, or {LOCAL!r} to start one on this machine; if the cluster requires "
        "a token, set RAY_AUTH_MODE=token"
    )


def _keep_silent(text: str) -> None:
    """Ignore a message."""


def cluster_resources() -> tuple[float, float]:
    """Total logical CPUs and GPUs of the cluster."""
    resources = ray.cluster_resources()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def dashboard_url() -> str | None:
    """The URL of the dashboard of the cluster that this process has joined, or None."""
    where = dashboard_address()
    return f"http://{where}" if where else None


def cpus_free() -> float:
    """Logical CPUs of the cluster that are not reserved."""
    return float(ray.available_resources().get("CPU", 0.0))


def free_text() -> str:
    """The cluster's free resources as text for messages."""
    (cpus, gpus), free = cluster_resources(), ray.available_resources()
    return (
        f"the cluster has {cpus:g} CPU and {gpus:g} GPU, of which {free.get('CPU', 0.0):g} and "
        f"{free.get('GPU', 0.0):g} are free"
    )


def default_workers(gpus_per_worker: float, *, cpus_per_worker: float = 1.0) -> int:
    """The number of workers that fills the cluster at its current size.

    Args:
        gpus_per_worker: GPUs of one worker, possibly a fraction; 0 for workers without one.
        cpus_per_worker: logical CPUs of one worker.

    Raises:
        WorkerError: no node of the cluster can hold a single worker.
    """
    count = room_for_workers(gpus_per_worker, cpus_per_worker=cpus_per_worker)
    if count < 1:
        cpus, gpus = cluster_resources()
        raise WorkerError(
            f"a worker needs {cpus_per_worker:g} CPU and {gpus_per_worker:g} GPU of one node, but "
            f"the cluster has {cpus:g} CPU and {gpus:g} GPU in all; ask for less or use a larger "
            "cluster; if nodes are added on demand, set the number of workers"
        )
    return count


def room_for_workers(gpus_per_worker: float, *, cpus_per_worker: float = 1.0) -> int:
    """How many workers the nodes of the cluster can hold when idle."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(
            fit(cpus_per_worker, node.get("CPU", 0.0)),
            fit_gpus(gpus_per_worker, node.get("GPU", 0.0)) if gpus_per_worker else sys.maxsize,
        )
        for node in nodes
    )


def worker_environment(*, threads: int | None) -> dict[str, str]:
    """Environment variables of a worker process.

    A worker can import the same modules as this process. The number of threads must be set before
    any numerical library is imported: it decides how sums are split, and so the last bits of every
    result.

    Args:
        threads: threads of the numerical libraries; Ray's choice if None.
    """
    environment = {
        "PYTHONPATH": os.pathsep.join([*_search_path(), "${PYTHONPATH}"]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return environment


class HeldInActor:
    """The object in an actor's process: it wraps an object that a factory creates there."""

    def __init__(self) -> None:
        self._held: Any = None
        # Before the next arguments import the libraries that read these variables.
        os.environ.update(libraries_environment())
        # The next arguments import thousands of modules, which stay: searching them for garbage
        # repeatedly takes a sixth of the time.
        gc.disable()

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the wrapped object."""
        return getattr(self._held, method)(*args)

    def _hold(self, factory: type, args: tuple[Any, ...], threads: int | None) -> None:
        """Create the object. Not in ``__init__``: Ray would report its errors as mere text."""
        try:
            limit_threads(threads)
            self._held = factory(*args)
        finally:
            gc.enable()


def root_cause(error: BaseException) -> Failure:
    """The root cause of an error: exception type, message and the last traceback line.

    An error that Ray wrapped is unwrapped; the death of a process is reported with the known
    details, without Ray's advice.
    """
    if isinstance(error, ray_exceptions.RayTaskError):
        return failure_of(original(error), _last_frame(str(error)))
    if isinstance(error, ray_exceptions.OutOfMemoryError):
        return Failure(
            f"{type(error).__name__}: {_short_of_memory(full_text(error))}", FailureKind.MEMORY
        )
    if isinstance(error, ray_exceptions.RayActorError):
        text = full_text(error)
        return Failure(f"{type(error).__name__}: {_death(text)}", _kind_of_death(text))
    if isinstance(error, ray_exceptions.RayError):
        return Failure(f"{type(error).__name__}: {one_line(full_text(error))}")
    return cause_here(error)


def original(error: ray_exceptions.RayTaskError) -> BaseException:
    """The exception that the worker raised, before Ray wrapped it."""
    cause: BaseException = error
    while isinstance(cause, ray_exceptions.RayTaskError) and cause.cause is not cause:
        cause = cause.cause
    return cause


def _connect(where: str, num_cpus: int | None, say: Callable[[str], None]) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if where == LOCAL:
        folder, reason = folder_for_ray()
        if reason is not None:
            say(f"Ray keeps its files in {folder} ({reason})")
        with _prepared(), environment(token() | _patience()):
            ray.init(
                LOCAL,
                include_dashboard=False,
                num_cpus=num_cpus,
                **folder_option(folder),
                **quiet,
            )
    else:
        knock(where)
        ray.init(where, **quiet)


def _patience() -> dict[str, str]:
    """The variable that lets a busy machine start Ray: by default it has half a minute."""
    return {_PATIENCE: os.environ.get(_PATIENCE, "120")}


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    """Start a cluster in this block as a job needs it: closed, light, and out of reach of Ctrl-C.

    It listens on the loopback interface only. It has no dashboard agent, which would serve HTTP on
    a fixed port: a second cluster on the machine would wait for that port for five seconds. Ctrl-C
    and the end of the terminal go to all processes of a job at once; Ray's would end, and the
    driver, which has work to save, would wait for them for a minute. They end with the driver,
    however it ends.
    """
    with on_loopback(), without_agent(), without_monitors(), processes_in_own_session():
        yield


def _disconnect() -> None:
    with signals.deferred(), _handlers_kept():
        ray.shutdown()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep this process's SIGTERM handler while Ray starts or ends in this block.

    Ray's own handlers end the process with another status and print a stack, and after Ray has
    ended there is no handler at all. If this process has none, Ray's are better than nothing.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        yield
        return
    with sigterm_untouched(), signals.kept():
        yield


def knock(where: str) -> None:
    """Raise ConnectionError at once if the address does not answer: Ray would retry for minutes."""
    found = _HOST_AND_PORT.fullmatch(where)
    if found is None:
        return
    try:
        socket.create_connection((found["host"], int(found["port"])), timeout=_KNOCK_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing listens there ({error})") from error


def _search_path() -> list[str]:
    """The import paths of this process besides its Python installation.

    Ray passes the driver's script folder and working directory to its workers, but not the rest of
    the driver's path, for example a checkout named in PYTHONPATH. A folder that another machine
    does not have does no harm there.
    """
    installations = (Path(sys.prefix), Path(sys.base_prefix))
    folders = [Path(entry).resolve() for entry in sys.path if entry and Path(entry).is_dir()]
    return [
        str(folder)
        for folder in dict.fromkeys(folders)
        if not any(folder.is_relative_to(installation) for installation in installations)
    ]


def _short_of_memory(text: str) -> str:
    used = _MEMORY_USED.search(text)
    how = f" ({used[1]} of {used[2]} were in use)" if used else ""
    return f"memory ran low: Ray ended the process before its machine ran out{how}"


def _kind_of_death(text: str) -> FailureKind:
    """Whether a process may have ended for lack of memory; only Ray's message shows it."""
    killed = any(sign in text for sign in (_SILENT_END, "SIGKILL", "OutOfMemory"))
    return FailureKind.MEMORY if killed else FailureKind.OTHER


def _death(text: str) -> str:
    """How a process ended, as far as Ray knows, and which process it was."""
    said = text.partition("Some common causes")[0]
    number = re.search(r"^\s*pid: (\d+)", said, re.MULTILINE)
    machine = re.search(r"^\s*ip: (\S+)", said, re.MULTILINE)
    if number is None or machine is None:
        return one_line(said)
    who = f"process {number[1]} on {machine[1]}"
    if _SILENT_END not in said:
        return f"{who}: {one_line(said[machine.end() :])}"
    return (
        f"its worker process exited without an error message ({who}), as after signal 9 (SIGKILL): "
        "it crashed or was killed; the kernel kills processes when memory is short"
        f"{_kernel_says(machine[1])}"
    )


def _kernel_says(machine: str) -> str:
    """Whether this machine's kernel has killed a process for lack of memory since the run began."""
    if machine not in ("127.0.0.1", ray.util.get_node_ip_address()):
        return ""
    return " (and has done here since the run began)" if _oom_kills() > _OOM_KILLS_BEFORE else ""


def _oom_kills() -> int:
    """The number of processes that the kernel has killed for lack of memory; 0 if unknown."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


_OOM_KILLS_BEFORE = _oom_kills()


def _last_frame(text: str) -> str:
    frames = _FRAME.findall(text)
    return "{}:{} in {}".format(*frames[-1]) if frames else ""
