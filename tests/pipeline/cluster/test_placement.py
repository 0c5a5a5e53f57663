"""A job's resource requests compared with this machine."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray._private import accelerators

from pipeline.cluster.placement import asks, check_gpus, crowding
from pipeline.errors import JobError
from pipeline.job.config import EditSettings, TargetsConfig, UpdateConfig


def job(**sections: Any) -> EditSettings:
    """The settings of a job that select its processes."""
    found = SimpleNamespace(
        targets=TargetsConfig(**sections.get("targets", {})),
        update=UpdateConfig(**sections.get("update", {})),
    )
    return cast(EditSettings, found)


class Machine:
    """A machine with GPUs as counted by Ray and by PyTorch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.by_ray = self.by_torch = 0
        manager = accelerators.get_accelerator_manager_for_resource("GPU")
        patch.setattr(manager, "get_current_node_num_accelerators", lambda: self.by_ray)
        patch.setattr("torch.cuda.device_count", lambda: self.by_torch)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr("ray.is_initialized", lambda: False)

    def has(self, gpus: int) -> None:
        self.by_ray = self.by_torch = gpus


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def refused(wanted: EditSettings, address: str | None = None) -> str | None:
    try:
        check_gpus(asks(wanted), address)
    except JobError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("gpus", "sections", "message"),
    [
        (
            0,
            {"targets": {"workers": 1, "gpus_per_worker": 1}},
            "targets.gpus_per_worker: 1, but this machine has no GPU; set targets.gpus_per_worker "
            "to 0, to compute on CPUs, or run on a machine or a cluster that has some (--address)",
        ),
        (
            0,
            {"targets": {"gpus_per_worker": 0.5}, "update": {"gpus_per_rank": 1}},
            "targets.gpus_per_worker: 0.5, but this machine has no GPU; set "
            "targets.gpus_per_worker to 0, to compute on CPUs, or run on a machine or a cluster "
            "that has some (--address)\n"
            "update.gpus_per_rank: 1, but this machine has no GPU; set update.gpus_per_rank to 0, "
            "to compute on CPUs, or run on a machine or a cluster that has some (--address)",
        ),
        (
            1,
            {"targets": {"workers": 1, "gpus_per_worker": 2}},
            "targets.gpus_per_worker: 2, but this machine has 1 GPU; set targets.gpus_per_worker "
            "to 1 at most, or run on a cluster that has more, with --address",
        ),
        (
            2,
            {"targets": {"workers": 5, "gpus_per_worker": 0.5}},
            "targets.workers: 5 of 0.5 GPU each are more than the 4 that fit on this machine, "
            "which has 2 GPUs; set targets.workers to 4 or auto, or run on a cluster that has "
            "more, with --address",
        ),
        (
            3,
            {"targets": {"workers": 2, "gpus_per_worker": 2}},
            "targets.workers: 2 of 2 GPU each are more than the 1 that fit on this machine, "
            "which has 3 GPUs; set targets.workers to 1 or auto, or run on a cluster that has "
            "more, with --address",
        ),
        (
            1,
            {"update": {"ranks": 4, "gpus_per_rank": 1}},
            "update.ranks: 4 of 1 GPU each are more than the 1 that fit on this machine, which "
            "has 1 GPU; set update.ranks to 1 or auto, or run on a cluster that has more, with "
            "--address",
        ),
    ],
)
def test_more_gpus_than_there_are_are_refused(
    gpus: int, sections: dict[str, Any], message: str, machine: Machine
) -> None:
    machine.has(gpus)
    assert refused(job(**sections)) == message


def test_what_fits_is_let_through(machine: Machine) -> None:
    machine.has(2)
    parts = {"workers": 4, "gpus_per_worker": 0.5}
    assert refused(job(targets=parts, update={"ranks": 2, "gpus_per_rank": 1})) is None
    assert refused(job(targets={"gpus_per_worker": 2})) is None
    machine.has(0)
    assert refused(job()) is None


def test_only_what_runs_here_is_asked_of_this_machine(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(targets={"gpus_per_worker": 1})
    assert refused(wanted, "head:6379") is None
    assert refused(wanted, "local") is not None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert refused(wanted) is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert refused(wanted) is not None
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert refused(wanted) is None


def test_devices_that_are_hidden_or_of_no_use_do_not_count(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(targets={"workers": 2, "gpus_per_worker": 1})
    machine.has(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine.by_torch = 1
    assert "1 GPU (CUDA_VISIBLE_DEVICES is '1')" in str(refused(wanted))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine.by_torch = 0
    said = str(refused(wanted))
    assert f"no GPU (Ray sees 2, PyTorch {torch.__version__} sees 0)" in said


def test_a_crowd_is_warned_about(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    crowd = job(targets={"workers": 64}, update={"ranks": 64})
    assert crowding(crowd, None) == [
        f"{key}: 64 {what}s of 1 CPU each share the 2 of this machine; each needs its own "
        f"memory, and together they are no faster: set {key} to 2, or to auto"
        for key, what in (("targets.workers", "worker"), ("update.ranks", "rank"))
    ]
    assert crowding(crowd, "head:6379") == []
    assert crowding(job(targets={"workers": 4}, update={"ranks": 2}), None) == []
    (text,) = crowding(job(targets={"workers": 2, "threads_per_worker": 8}), None)
    assert "2 workers of 8 CPU each share the 2" in text
    machine.has(8)
    assert crowding(job(targets={"workers": 8, "gpus_per_worker": 1}), None) == []
