"""Reads the state of a run from its folder, without contacting a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import StorageError
from pipeline.run_folder import STATUS, last_holder
from pipeline.storage import Store

State = Literal["running", "complete", "held", "stopped", "failed", "lost"]


@dataclass(frozen=True)
class RunState:
    """The state of a run according to its folder.

    Attributes:
        url: location of the folder.
        state: status in ``run.json``; ``lost`` if that says running but no process holds the lease.
        silent_s: seconds since the last sign of life; None once the run has ended.
        run: content of ``run.json``.
    """

    url: str
    state: State
    silent_s: float | None
    run: Mapping[str, Any]

    @property
    def seconds_left(self) -> float | None:
        """Seconds left in the current stage; None if not yet known."""
        progress = self.run.get("progress") or {}
        done, total, rate = (progress.get(key) for key in ("done", "total", "rate"))
        if done is None or not total or not rate:
            return None
        return max(0.0, (total - done) / rate)

    def as_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "run": self.url,
            "state": self.state,
            "silent_s": self.silent_s,
            "seconds_left": self.seconds_left,
            **{key: self.run.get(key) for key in _SHOWN},
        }


_SHOWN = (
    "attempt",
    "submission",
    "exit_status",
    "error",
    "started_at",
    "finished_at",
    "stage",
    "progress",
    "stages",
    "counts",
    "events",
)


def read_state(folder: str) -> RunState | None:
    """Return the state of the run in a folder; None if no run has started.

    Raises:
        StorageError: the folder cannot be read, or holds a damaged file.
    """
    store = Store(folder)
    if not store.exists(STATUS):
        return None
    run = store.read_json(STATUS)
    if not isinstance(run, dict) or not isinstance(run.get("status"), str):
        raise StorageError(
            f"{store.join(STATUS)} is not the status of a run; check that this is a run folder"
        )
    if run["status"] != "running":
        return RunState(store.url, run["status"], None, run)
    found = last_holder(store)
    if found is None:
        return RunState(store.url, "lost", None, run)
    holder, silent_s = found
    alive = not (holder.released_at or holder.is_dead or silent_s > holder.expires_s)
    return RunState(store.url, "running" if alive else "lost", round(silent_s, 1), run)
