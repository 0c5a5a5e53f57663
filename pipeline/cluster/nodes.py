"""Nodes of a cluster that a job needs and that may still come.

A cluster that is joined may grow, because an autoscaler or a person adds nodes. Where it could not
hold what a job asks for even if nothing else ran on it, the run says what it waits for, asks the
cluster for it, and gives up after a while.
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
    """Wait until the nodes of the cluster could hold what is asked for, were nothing else on them.

    Meanwhile the cluster is asked for the place, so that an autoscaler adds nodes.

    Args:
        ask: what is asked for.
        say: called with a sentence if there is something to wait for.

    Raises:
        NoRoomError: the cluster was not large enough in time.
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
    """A time as people say it: ``15 minutes``, ``0.5 s``."""
    return f"{seconds:g} s" if seconds < 120 or seconds % 60 else f"{seconds / 60:g} minutes"
