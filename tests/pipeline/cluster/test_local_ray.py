"""The folder of a local Ray's files, whatever the environment names."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster import local_ray
from pipeline.cluster.local_ray import LONGEST_PATH, folder_for_ray
from pipeline.errors import StorageError
from tests.conftest import ROOT

OWN = f"pmet-{os.getuid()}"


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder that Ray can use, as the only candidate."""
    monkeypatch.setattr(local_ray, "LONGEST_PATH", len(str(tmp_path)) + 40)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return use(tmp_path / "tmp", monkeypatch)


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def others(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(local_ray, "_ELSEWHERE", tuple(map(str, folders)))


def test_its_files_are_in_a_folder_of_the_user(usual: Path) -> None:
    assert folder_for_ray() == (usual / OWN / "ray", None)
    assert (usual / OWN).stat().st_mode & 0o777 == 0o700


def test_a_folder_for_ray_alone_is_used_as_it_is(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert folder_for_ray() == (tmp_path / "ray", None)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tmp ü", "accepts only ASCII"),
        ("l" * 60, r"accepts at most \d+ bytes"),
    ],
)
def test_a_temporary_folder_that_ray_cannot_use_is_replaced(
    name: str, why: str, usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = use(tmp_path / name, monkeypatch)
    others(monkeypatch, usual)
    folder, reason = folder_for_ray()
    assert folder == usual / OWN / "ray"
    assert reason is not None
    assert reason.startswith(f"TMPDIR: Ray cannot use {odd}")
    assert why.replace(r"\d+", str(local_ray.LONGEST_PATH)) in reason
    assert not list(odd.iterdir())


def test_what_another_user_has_prepared_is_passed_over(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (usual / OWN).mkdir()
    (usual / OWN).chmod(0o777)
    (other := tmp_path / "other").mkdir()
    others(monkeypatch, other)
    folder, reason = folder_for_ray()
    assert folder == other / OWN / "ray"
    assert "is open to other users" in str(reason)
    others(monkeypatch)
    with pytest.raises(StorageError, match=r"Ray has no folder .*TMPDIR: .*Set RAY_TMPDIR to a"):
        folder_for_ray()


def test_the_longest_path_leaves_room_for_rays_sockets() -> None:
    from ray._private.utils import validate_socket_filepath

    from pipeline.cluster.ray_internals import SOCKET

    folder = "/" + "x" * (LONGEST_PATH - 1)
    validate_socket_filepath(folder + SOCKET)
    with pytest.raises(OSError, match="length cannot exceed"):
        validate_socket_filepath(f"{folder}x{SOCKET}")


HOSTILE = """
import os, sys, ray
from pipeline.cluster.session import ray_session
from pipeline.cluster.worker_pool import WorkerPool
from pipeline.cluster.tasks import Task
from decimal import Decimal

with ray_session(num_cpus=1, say=print), WorkerPool(Decimal, count=1) as pool:
    pool.run("is_zero", [Task("one")], lambda task, value: print("computed", value))
    print("ray", ray._private.worker._global_node.get_session_dir_path())
"""


def test_ray_starts_without_a_home_and_with_letters_that_are_not_ascii(tmp_path: Path) -> None:
    odd = tmp_path / "größe 'x'"
    odd.mkdir()
    (home := tmp_path / "home").touch()  # nothing can be created below a file
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(odd), "PYTHONPATH": str(ROOT)}
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE],
        cwd=odd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, computed, where = done.stdout.splitlines()[-3:]
    assert said.startswith("Ray keeps its files in /")
    assert f"(TMPDIR: Ray cannot use {odd}" in said
    assert computed == "computed True"
    session = Path(where.removeprefix("ray "))
    assert OWN in session.parts
    shutil.rmtree(session, ignore_errors=True)


def test_a_token_of_the_user_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    assert local_ray.token() == {}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = local_ray.token(), local_ray.token()
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert not list(tmp_path.iterdir())
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    assert local_ray.token() == {}
