"""Messages about dead processes; the texts are Ray's own."""

from __future__ import annotations

import os

import psutil
import pytest
from ray import exceptions as ray_exceptions
from ray._private import ray_constants

from pipeline.cluster import session
from pipeline.cluster.session import root_cause
from pipeline.failures import FailureKind

pytestmark = pytest.mark.usefixtures("no_ray")

WHO = """The actor died unexpectedly before finishing this task.
\tclass_name: _WorkerProcess
\tactor_id: 2e4a6bd3307ff3332c56f34101000000
\tpid: 25228
\tnamespace: 18a5be1e-1b9c-455c-a62b-f70833d65caa
\tip: 127.0.0.1
"""
ENDED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
SILENT = (
    "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory "
    "usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly."
)
OUT_OF_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the \
node (IP: 127.0.0.1, ID: aa7f) was 4.81GB used / 23.54GB limit (0.204217)
OOM kill reason: Memory usage 5095976960B exceeded threshold of 5055303168B
Object store memory usage: [- objects spillable: 0"""


def test_a_cluster_of_its_own_serves_nothing_on_a_fixed_port() -> None:
    # If the dashboard is installed Ray's agent would, and the next cluster would wait for it.
    with session.ray_session("local", num_cpus=1):
        started = psutil.Process().children(recursive=True)
        ports = {c.laddr.port for p in started for c in p.net_connections() if c.status == "LISTEN"}
    assert ports
    assert ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT not in ports


def test_a_busy_machine_has_two_minutes_to_start_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_gcs_server_port_wait_time_s", raising=False)
    began: dict[str, str] = {}
    monkeypatch.setattr(session.ray, "init", lambda *_, **__: began.update(os.environ))
    session._connect("local", 1, print)
    assert began["RAY_gcs_server_port_wait_time_s"] == "120"
    assert "RAY_gcs_server_port_wait_time_s" not in os.environ
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "7")
    session._connect("local", 1, print)
    assert began["RAY_gcs_server_port_wait_time_s"] == "7"


def dead(text: str) -> ray_exceptions.ActorDiedError:
    error = ray_exceptions.ActorDiedError()
    error.error_msg = WHO + text
    return error


def test_a_process_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_oom_kills", lambda: session._OOM_KILLS_BEFORE)
    failure = root_cause(dead(ENDED + SILENT))
    assert failure.text == (
        "ActorDiedError: its worker process exited without an error message (process 25228 on "
        "127.0.0.1), as after signal 9 (SIGKILL): it crashed or was killed; the kernel kills "
        "processes when memory is short"
    )
    assert failure.kind is FailureKind.MEMORY


def test_the_kernel_says_that_it_kills_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_oom_kills", lambda: session._OOM_KILLS_BEFORE + 1)
    said = root_cause(dead(ENDED + SILENT)).text
    assert said.endswith("when memory is short (and has done here since the run began)")


def test_a_process_that_ended_by_itself() -> None:
    detail = "Worker exit detail: Worker exits unexpectedly. Worker exits with an exit code 4."
    failure = root_cause(dead(ENDED + detail))
    said = failure.text
    assert said.startswith("ActorDiedError: process 25228 on 127.0.0.1: The actor is dead because")
    assert said.endswith("Worker exits with an exit code 4.")
    assert "SIGKILL" not in said
    assert failure.kind is FailureKind.OTHER


def test_a_machine_that_is_lost() -> None:
    said = root_cause(dead("The actor died because its node has died. Node Id: 3f00")).text
    assert said == (
        "ActorDiedError: process 25228 on 127.0.0.1: The actor died because its node has died. "
        "Node Id: 3f00"
    )


def test_memory_that_is_short() -> None:
    failure = root_cause(ray_exceptions.OutOfMemoryError(OUT_OF_MEMORY))
    assert failure.kind is FailureKind.MEMORY
    assert failure.text == (
        "OutOfMemoryError: memory ran low: Ray ended the process before its machine ran out "
        "(4.81GB of 23.54GB were in use)"
    )
