"""Every name that this project uses of Ray beyond its documented interface.

``NAMES`` says what each is for and why no public name serves. The tests of this module look for
each of them in the Ray that is installed, so that an upgrade that removes one is noticed there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from pipeline.cluster.process import environment

NAMES = {
    "ray._private.worker._global_node": (
        "to tell a cluster that this process started from one that it joined; ray.init says "
        "neither, nor does the runtime context"
    ),
    "ray._private.worker.get_dashboard_url": (
        "to show where the dashboard is where Ray was initialised by the caller; only the return "
        "value of ray.init has the address"
    ),
    "ray._private.services.ConsolePopen": (
        "to start Ray's processes in a session of their own, out of reach of Ctrl-C; ray.init "
        "takes no option for it"
    ),
    "ray._private.utils.set_sigterm_handler": (
        "to keep this process's handler of SIGTERM; ray.init always replaces it"
    ),
    "ray._private.utils.get_dashboard_dependency_error": (
        "to start no dashboard agent; include_dashboard=False leaves the agent and its fixed port"
    ),
    "ray._private.services.start_api_server": (
        "to start no dashboard; include_dashboard=False starts one that serves nothing, and "
        "ray.init waits for it"
    ),
    "ray._private.parameter.RayParams": (
        "to start no autoscaler and no log monitor, which a session of one job never uses; "
        "ray.init has no option for either"
    ),
    "ray._private.ray_constants.ENABLE_RAY_CLUSTER": (
        "to listen on 127.0.0.1 only; ray.init replaces a loopback address by the machine's own"
    ),
    "ray._private.accelerators.get_accelerator_manager_for_resource": (
        "to count this machine's GPUs as Ray will, before Ray is started"
    ),
    "ray._raylet.AuthenticationTokenLoader": (
        "to forget the token of a cluster that has ended; Ray keeps the first one it reads"
    ),
    "ray.init._temp_dir": (
        "to choose the folder for Ray's files; RAY_TMPDIR is read when Ray is imported"
    ),
    "ray.dashboard.modules.dashboard_sdk": "to quiet the job client; its level is not an option",
    "ray.dashboard.modules.job.sdk": "to quiet the job client; its level is not an option",
    "ray._private.runtime_env.packaging": "to quiet uploads; their level is not an option",
}
VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": (
        "to have Ray's processes listen on 127.0.0.1 only, as the constant does in this process"
    ),
    "RAY_prestart_worker_first_driver": (
        "to start no idle workers: ours have environments of their own and never use them"
    ),
}
SOCKET = "/session_2026-11-27_09-29-59_123456_4194304/sockets/plasma_store"
"""The longest path that Ray makes below its folder; Ray names no limit for the folder itself."""
_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def started_here() -> bool:
    """Whether this process started the cluster that it is connected to."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def dashboard_address() -> str | None:
    """``host:port`` of the dashboard of the cluster that this process has joined, if it has one."""
    where: str | None = ray._private.worker.get_dashboard_url()
    return where or None


def folder_option(folder: Path) -> dict[str, str]:
    """The argument of ``ray.init`` that makes a new cluster keep its files in ``folder``."""
    return {"_temp_dir": str(folder)}


def reset_token() -> None:
    """Use the user's own token again for the next cluster, which may be another user's.

    An older Ray has none.
    """
    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()


def gpus_seen() -> int:
    """GPUs of this machine that Ray would use, without those that the environment hides."""
    manager = ray._private.accelerators.get_accelerator_manager_for_resource("GPU")
    count: int = manager.get_current_node_num_accelerators()
    visible = manager.get_current_process_visible_accelerator_ids()
    return count if visible is None else min(count, len(visible))


def quiet_job_client() -> None:
    """Have the client of Ray's job server log warnings only."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def processes_in_own_session() -> Iterator[None]:
    """Start Ray's processes in this block in a session of their own."""
    services = ray._private.services
    plain = getattr(services, "ConsolePopen", None)
    started = None if plain is None else functools.partial(plain, start_new_session=True)
    with _replaced(services, "ConsolePopen", started):
        yield


@contextlib.contextmanager
def sigterm_untouched() -> Iterator[None]:
    """Keep Ray from setting a handler of SIGTERM in this block."""
    with _replaced(ray._private.utils, "set_sigterm_handler", lambda handler: None):
        yield


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Start a cluster in this block that listens on 127.0.0.1 instead of on every interface.

    Ray does so by itself on systems where it supports no cluster of several nodes, and only there.
    The variable says that this is such a system; Ray has read it by now, hence the constant.
    """
    constants = ray._private.ray_constants
    with (
        _replaced(constants, "ENABLE_RAY_CLUSTER", False),
        environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}),
    ):
        yield


@contextlib.contextmanager
def without_agent() -> Iterator[None]:
    """Start a cluster in this block without dashboard agents and without idle workers."""
    missing = ImportError("not wanted here")
    with (
        _replaced(ray._private.utils, "get_dashboard_dependency_error", lambda: missing),
        environment({"RAY_prestart_worker_first_driver": "0"}),
    ):
        yield


@contextlib.contextmanager
def without_monitors() -> Iterator[None]:
    """Start a cluster in this block without an autoscaler, a log monitor or a dashboard.

    A cluster of one machine and one job uses none of them: no node can be added, ``log_to_driver``
    is off, and ``include_dashboard=False`` would still start a dashboard that serves nothing. Each
    is a process that takes a second of CPU time to start and some 60 MiB of memory.
    """
    parameter, services = ray._private.parameter, ray._private.services
    plain = getattr(parameter, "RayParams", None)
    fewer = plain and functools.partial(plain, include_log_monitor=False, no_monitor=True)
    with (
        _replaced(parameter, "RayParams", fewer),
        # What Ray's own function returns where the dashboard does not start.
        _replaced(services, "start_api_server", lambda *args, **options: (None, None)),
    ):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name, None)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
