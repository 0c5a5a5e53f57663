"""Workers that outlive a run: for many runs of one model, one after the other.

To start a process with a model takes longer than the work of a small job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from pipeline.events import OnEvent

if TYPE_CHECKING:
    from pipeline.cluster import WorkerPool


class KeptWorkers:
    """Keeps a run's workers for the next run; use it as a context manager.

    Only runs of jobs that want the same workers share them: another model, device, size or time
    limit ends the ones kept, and starts others. The Ray session must be open for as long.
    """

    def __init__(self) -> None:
        self._pool: WorkerPool | None = None
        self._wanted: Any = None

    def take(
        self,
        wanted: Any,
        start: Callable[[], WorkerPool],
        on_event: OnEvent,
        grown: Callable[[], int] | None,
    ) -> WorkerPool:
        """Return the workers kept if they are as wanted, or start others.

        Args:
            wanted: whatever tells these workers from others; compared by value.
            start: starts them.
            on_event: the run's; called with deaths, retries and failures from now on.
            grown: as for `WorkerPool`.
        """
        if self._pool is None or self._pool.closed or self._wanted != wanted:
            self.close()
            self._pool, self._wanted = start(), wanted
        self._pool.serve(on_event, grown)
        return self._pool

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
