"""How a run is doing, as its folder tells: no cluster is asked."""

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
    """What a run folder says.

    Attributes:
        url: of the folder.
        state: as of ``run.json``; ``lost`` where it says running, and nobody does.
        silent_s: seconds since the run was heard of; None once it has ended.
        run: what ``run.json`` holds.
    """

    url: str
    state: State
    silent_s: float | None
    run: Mapping[str, Any]

    @property
    def seconds_left(self) -> float | None:
        """Of the stage that is under way; None where that cannot be told yet."""
        progress = self.run.get("progress") or {}
        done, total, rate = (progress.get(key) for key in ("done", "total", "rate"))
        if done is None or not total or not rate:
            return None
        return max(0.0, (total - done) / rate)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
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
    """How the run in a folder is doing; None where none has begun.

    Raises:
        StorageError: the folder cannot be read, or holds a damaged file.
    """
    store = Store(folder)
    if not store.exists(STATUS):
        return None
    run = store.read_json(STATUS)
    if not isinstance(run, dict) or not isinstance(run.get("status"), str):
        raise StorageError(f"{store.join(STATUS)} is no status of a run; is this a run folder?")
    if run["status"] != "running":
        return RunState(store.url, run["status"], None, run)
    found = last_holder(store)
    if found is None:
        return RunState(store.url, "lost", None, run)
    holder, silent_s = found
    alive = not (holder.released_at or holder.is_dead or silent_s > holder.expires_s)
    return RunState(store.url, "running" if alive else "lost", round(silent_s, 1), run)
