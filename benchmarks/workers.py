"""Workers: how targets scale from one worker process to several, one thread each.

python -m benchmarks.workers --count 200 --workers 2
"""

from __future__ import annotations

import tempfile
from typing import Any

import ray

from benchmarks.harness import arguments, problem, show, timed
from pipeline.cluster import Task, WorkerPool, ray_session
from pipeline.models import ModelSource
from pipeline.storage import Store
from pipeline.workers import ModelWorker, TargetTask


def main() -> None:
    """Time the same shards on one worker and on several."""
    parser = arguments(__doc__ or "", count=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=20)
    options = parser.parse_args()
    given = problem(options)
    source = ModelSource(options.model, on_gpu=False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ray_session():
        for workers in (1, options.workers):
            pool = WorkerPool(
                ModelWorker, count=workers, init_args=(source,), threads=options.threads
            )
            with pool:
                tasks = [
                    Task(
                        f"shard {start}",
                        (
                            TargetTask(
                                source=source,
                                requests=given.requests[start : start + options.shard_size],
                                rows=range(len(given.requests))[start : start + options.shard_size],
                                hparams=given.hparams,
                                templates=given.templates,
                                shared_keys="joint",
                                batch_size=None,
                                memory_share=1.0,
                                output=Store(folder),
                                name=f"{workers}-{start}",
                            ),
                        ),
                    )
                    for start in range(0, len(given.requests), options.shard_size)
                ]
                # The first shards include the start-up time of the processes.
                pool.run("find_targets", tasks[:workers], lambda *_: None)
                seconds, failed = timed(
                    lambda tasks=tasks, pool=pool: pool.run(  # type: ignore[misc]
                        "find_targets", tasks, lambda *_: None
                    )
                )
            assert not failed, failed
            rate = len(given.requests) / seconds
            times = rate / rows[0]["targets/s"] if rows else 1.0
            rows.append({"workers": workers, "targets/s": rate, "times one worker": times})
        assert ray.is_initialized()
    show(f"{len(given.requests)} targets, {len(tasks)} shards", rows, options)


if __name__ == "__main__":
    main()
