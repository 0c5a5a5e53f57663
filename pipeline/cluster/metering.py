"""Metrics of a run in Ray's metrics, which Prometheus reads from every node.

| metric | tags | |
| --- | --- | --- |
| ``pmet_stage_done``, ``pmet_stage_total`` | ``run``, ``stage`` | items of a stage |
| ``pmet_stage_rate`` | ``run``, ``stage`` | items per second: targets, in the stage of that name |
| ``pmet_shards_done`` | ``run`` | shards of targets that have been stored |
| ``pmet_events`` | ``run``, ``kind`` | events by kind: ``retry``, ``death``, ``timeout`` … |
| ``pmet_gpu_peak_bytes`` | ``work`` | peak memory that a worker or a rank allocated on its GPU |

Ray adds node and process. Nothing is sent until this process has joined a cluster. Ray accepts only
ASCII: in tag values, all other characters, control characters and ``%`` are percent-encoded as
UTF-8, ``runs/läuf`` as ``runs/l%C3%A4uf``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline.events import EventKind
from pipeline.progress import CountedStage, Progress, Stage

if TYPE_CHECKING:
    from ray.util import metrics

# Left as is in a tag: the printable ASCII characters except %, which marks the others.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_GAUGES = {
    "done": ("pmet_stage_done", "Items of a stage that are done."),
    "total": ("pmet_stage_total", "Items of a stage."),
    "rate": ("pmet_stage_rate", "Items of a stage done per second."),
}


class MeteredProgress(Progress):
    """Forwards all calls to another progress display, and sets Ray's metrics.

    Args:
        shown: the progress display.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._run = ""
        self._joined = False

    def begin(self, run: str, attempt: int, submission: str | None) -> None:
        """See `Progress.begin`."""
        self._run = run
        self._shown.begin(run, attempt, submission)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """See `Progress.stage`."""
        with self._shown.stage(name, total) as stage:
            yield _MeteredStage(stage, total, self, name)

    def event(
        self, kind: EventKind, text: str, *, shard: str | None = None, attempt: int | None = None
    ) -> None:
        """See `Progress.event`."""
        self.count("pmet_events", "Events.", kind=kind)
        self._shown.event(kind, text, shard=shard, attempt=attempt)

    def count(self, name: str, what: str, **tags: str) -> None:
        """Add one to a counter."""
        if self._has_cluster():
            tags |= {"run": self._run}
            _counter(name, what, tuple(sorted(tags))).inc(1.0, _ascii(tags))

    def gauge(self, stage: str, count: dict[str, Any]) -> None:
        """Set the gauges of a stage from its current count."""
        if not self._has_cluster():
            return
        for key, (name, what) in _GAUGES.items():
            if count[key] is not None:
                tags = {"run": self._run, "stage": stage}
                _gauge(name, what, ("run", "stage")).set(float(count[key]), _ascii(tags))

    def _has_cluster(self) -> bool:
        """Whether this process has joined a cluster; reports once where its dashboard is."""
        if not _in_cluster():
            return False
        if not self._joined:
            from pipeline.cluster.session import dashboard_url

            self._joined = True
            if url := dashboard_url():
                self._shown.event(EventKind.NOTE, f"Ray's dashboard: {url}")
        return True


class _MeteredStage(CountedStage):
    def __init__(
        self, shown: Stage, total: int | None, progress: MeteredProgress, name: str
    ) -> None:
        super().__init__(shown, total, lambda count: progress.gauge(name, count))
        self._progress = progress

    def shard(self, name: str) -> None:
        super().shard(name)
        self._progress.count("pmet_shards_done", "Shards of targets that were stored.")


def tell_gpu_memory(work: str) -> None:
    """Set the peak memory allocated on this process's GPUs; does nothing without one."""
    import torch

    if _in_cluster() and torch.cuda.is_available():
        gauge = _gauge("pmet_gpu_peak_bytes", "Peak memory allocated on a GPU.", ("work",))
        with contextlib.suppress(RuntimeError):
            gpus = range(torch.cuda.device_count())
            gauge.set(
                float(max(map(torch.cuda.max_memory_allocated, gpus))), _ascii({"work": work})
            )


def _in_cluster() -> bool:
    """Whether this process has joined a cluster, for which it must have imported Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _ascii(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags in ASCII, as Ray requires; `urllib.parse.unquote` restores the text."""
    return {name: quote(text, _PLAIN, errors="surrogateescape") for name, text in tags.items()}


@cache
def _gauge(name: str, what: str, tags: tuple[str, ...]) -> metrics.Gauge:
    from ray.util import metrics

    return metrics.Gauge(name, description=what, tag_keys=tags)


@cache
def _counter(name: str, what: str, tags: tuple[str, ...]) -> metrics.Counter:
    from ray.util import metrics

    return metrics.Counter(name, description=what, tag_keys=tags)
