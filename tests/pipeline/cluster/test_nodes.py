"""The resources that a job needs of a cluster that is still too small."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cluster import nodes
from pipeline.cluster.nodes import wait_for_nodes
from pipeline.cluster.placement import Ask
from pipeline.errors import NoRoomError


class Nodes:
    """A cluster whose nodes appear after some polls, if they are requested."""

    def __init__(self, patch: pytest.MonkeyPatch, *later: tuple[float, float]) -> None:
        self.nodes = [{"CPU": 1.0}]
        self.later, self.looks = list(later), 0
        self.asked: list[Any] = []
        patch.setattr("pipeline.cluster.session.ray.nodes", self._look)
        patch.setattr("pipeline.cluster.session.ray.cluster_resources", self._total)
        patch.setattr(nodes, "placement_group", self.asked.append)
        patch.setattr(nodes, "remove_placement_group", lambda _: self.asked.append("no more"))
        patch.setattr(nodes, "_LOOK_S", 0.001)

    def _look(self) -> list[Any]:
        self.looks += 1
        if self.asked and self.later:
            cpus, gpus = self.later.pop(0)
            self.nodes.append({"CPU": cpus, "GPU": gpus})
        return [{"Alive": True, "Resources": node} for node in self.nodes]

    def _total(self) -> dict[str, float]:
        return {name: sum(n.get(name, 0.0) for n in self.nodes) for name in ("CPU", "GPU")}


RANKS = Ask("rank", 3, 1, 1.0, "update.ranks", "update.gpus_per_rank")


def test_nodes_that_may_come_are_asked_for_and_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Nodes(monkeypatch, (8.0, 2.0), (8.0, 1.0))
    said: list[str] = []
    wait_for_nodes(RANKS, said.append)
    assert said == [
        "waiting for nodes, 15 minutes at most: 3 ranks of 1 CPU and 1 GPU each cannot be placed "
        "on the cluster, which has 1 CPU and 0 GPU in all"
    ]
    assert cluster.asked == [[{"CPU": 1, "GPU": 1.0}] * 3, "no more"]


def test_a_run_that_waits_in_vain_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Nodes(monkeypatch, (8.0, 2.0))
    monkeypatch.setattr(nodes, "START_TIMEOUT_S", 0.2)
    with pytest.raises(
        NoRoomError,
        match=r"no nodes came within 0\.2 s: 3 ranks of 1 CPU and 1 GPU each cannot be placed on "
        r"the cluster, which has 9 CPU and 2 GPU in all\. Add nodes, or lower update\.ranks or "
        r"update\.gpus_per_rank, and run the same job again",
    ):
        wait_for_nodes(RANKS, lambda _: None)
    assert cluster.asked[-1] == "no more"


def test_one_worker_is_enough_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Nodes(monkeypatch)
    wanted = Ask("worker", 9, 1, 0.0, "targets.workers", "targets.gpus_per_worker")
    wait_for_nodes(wanted, lambda _: pytest.fail("it waited"))
    assert not cluster.asked
