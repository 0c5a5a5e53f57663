"""The private names of Ray that are used exist in the Ray that is installed."""

from __future__ import annotations

import inspect
import mmap
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.cluster import ray_internals
from pipeline.cluster.ray_internals import NAMES, VARIABLES
from tests.internals import assert_has, exists

WHERE = "pipeline/cluster/ray_internals.py"
FILES = Path(ray.__file__).parent
# An argument among the keywords of ray.init, and variables that nothing in Python lists.
READ_BY = {
    "ray.init._temp_dir": '"_temp_dir"',
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": '"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"',
}


@pytest.mark.parametrize("name", NAMES)
def test_ray_has_the_name(name: str) -> None:
    read = READ_BY.get(name)
    found = exists(name) if read is None else read in inspect.getsource(ray.init)
    assert_has(found, name, NAMES, "ray", WHERE)


def test_ray_reads_the_variables() -> None:
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    constants = inspect.getsource(ray._private.ray_constants)
    assert_has(READ_BY[name] in constants, name, VARIABLES, "ray", WHERE)
    name = "RAY_prestart_worker_first_driver"
    raylet = FILES / "core" / "src" / "ray" / "raylet" / "raylet"
    with raylet.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        found = code.find(name.removeprefix("RAY_").encode()) >= 0
    assert_has(found, name, VARIABLES, "ray", WHERE)


def replaced_names() -> tuple[Any, ...]:
    private = ray._private
    return (
        private.services.ConsolePopen,
        private.services.start_api_server,
        private.parameter.RayParams,
        private.utils.set_sigterm_handler,
        private.utils.get_dashboard_dependency_error,
        private.ray_constants.ENABLE_RAY_CLUSTER,
    )


def test_what_they_do_ends_with_the_block() -> None:
    private = ray._private
    before = replaced_names()
    with (
        ray_internals.processes_in_own_session(),
        ray_internals.sigterm_untouched(),
        ray_internals.without_agent(),
        ray_internals.without_monitors(),
        ray_internals.on_loopback(),
    ):
        assert private.services.ConsolePopen.keywords == {"start_new_session": True}
        assert isinstance(private.utils.get_dashboard_dependency_error(), ImportError)
        assert private.ray_constants.ENABLE_RAY_CLUSTER is False
        asked = private.parameter.RayParams()
        assert (asked.include_log_monitor, asked.no_monitor) == (False, True)
        assert private.services.start_api_server(False) == (None, None)
    assert before == replaced_names()


def test_a_name_that_is_gone_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray._private.services, "ConsolePopen")
    said = (
        rf"^ray {ray.__version__} has no ray\._private\.services\.ConsolePopen any more: used to "
        r"start Ray's processes in a session .*; see pipeline/cluster/ray_internals\.py"
    )
    with pytest.raises(AssertionError, match=said):
        test_ray_has_the_name("ray._private.services.ConsolePopen")
