"""Waiting for nodes that a job needs and that may still join the cluster.

An existing cluster may grow, because an autoscaler or a person adds nodes. If it is too small for a
job's requirements even when idle, the run reports what it waits for, requests the resources from
the cluster, and gives up after a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.cluster.placement import Ask
from pipeline.cluster.session import cluster_resources, room_for_workers
from pipeline.errors import NoRoomError

START_TIMEOUT_S = 900.0
"""Seconds that a run waits for a cluster to have room."""
_LOOK_S = 1.0


def wait_for_nodes(ask: Ask, say: Callable[[str], None]) -> None:
    """Wait until the nodes of the cluster could meet a requirement if they were idle.

    Meanwhile the resources are requested from the cluster, so that an autoscaler adds nodes.

    Args:
        ask: the requirement.
        say: called with a sentence if the wait is not immediately over.

    Raises:
        NoRoomError: the cluster did not grow large enough in time.
    """
    if _holds(ask):
        return
    end = time.monotonic() + START_TIMEOUT_S
    say(f"waiting for nodes, {minutes(START_TIMEOUT_S)} at most: {_too_small(ask)}")
    bundle = {"CPU": ask.cpus, "GPU": ask.gpus}
    place = placement_group([{k: v for k, v in bundle.items() if v}] * ask.least)
    try:
        while not _holds(ask):
            if time.monotonic() > end:
                raise NoRoomError(
                    f"no nodes came within {minutes(START_TIMEOUT_S)}: {_too_small(ask)}. Add "
                    f"nodes, or lower {ask.count_key} or {ask.gpus_key}, and run the same job again"
                )
            time.sleep(_LOOK_S)
    finally:
        remove_placement_group(place)


def _holds(ask: Ask) -> bool:
    return room_for_workers(ask.gpus, cpus_per_worker=ask.cpus) >= ask.least


def _too_small(ask: Ask) -> str:
    cpus, gpus = cluster_resources()
    return f"{ask} cannot be placed on the cluster, which has {cpus:g} CPU and {gpus:g} GPU in all"


def minutes(seconds: float) -> str:
    """A duration as readable text: ``15 minutes``, ``0.5 s``."""
    return f"{seconds:g} s" if seconds < 120 or seconds % 60 else f"{seconds / 60:g} minutes"
