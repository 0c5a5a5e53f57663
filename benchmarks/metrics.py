"""Metrics: the batched form against the plain one, on the same requests in the same run.

python -m benchmarks.metrics --model MODEL --requests FACTS.parquet

The plain form is one pass for every prompt with every target, with all logits, as in
`pmet.reference`: with torch's default number of threads (or ``--threads``), and with one. The
    batched
form runs in this process with as many threads, and on the workers of a pipeline with one thread
each. The time to start processes and open models does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import Problem, arguments, problem, show, timed
from pipeline.cluster import Task, WorkerPool, ray_session
from pipeline.evaluation import How
from pipeline.models import ModelSource
from pipeline.stages import Answers, parts_of
from pipeline.workers import ModelWorker
from pmet.evaluation import METRICS, Prompts, evaluate, score_continuations
from pmet.reference import plain_evaluate

WARM = 8


def main() -> None:
    """Time both forms and report how they differ."""
    parser = arguments(__doc__ or "", count=600)
    parser.set_defaults(threads=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs of the batched forms")
    options = parser.parse_args()
    given = problem(options)
    few = Problem(*_parts(given), given.requests[:WARM])
    source = ModelSource(options.model, on_gpu=False)
    rows: list[dict[str, Any]] = []
    with ray_session():
        pool = WorkerPool(ModelWorker, count=options.workers, init_args=(source,), threads=1)
        with pool:
            # Each worker's first tasks include its start-up time.
            (part,) = parts_of(few.requests)
            warming = [Task(f"warm {i}", (source, How(), part)) for i in range(16)]
            assert not pool.run("measure", warming, lambda *_: None)
            here, on_workers = [], []
            for _ in range(options.repeat):
                on_workers.append(timed(lambda: _on_workers(pool, source, given)))
            _plain(few)
            torch.set_num_threads(1)
            one_thread, plain = timed(lambda: _plain(given))
            torch.set_num_threads(options.threads)
            plain_seconds = timed(lambda: _plain(given))[0] if options.threads > 1 else one_thread
            _batched(few)
            for _ in range(options.repeat):
                here.append(timed(lambda: _batched(given)))
                on_workers.append(timed(lambda: _on_workers(pool, source, given)))
    pairs = list(plain["nll"])
    scored = score_continuations(given.model, Prompts(given.tokenizer), pairs)
    apart = max(abs(scored[pair].log_prob + plain["nll"][pair]) for pair in pairs)
    many = [(f"plain, {options.threads} thread(s)", [(plain_seconds, plain["rows"])])]
    many.append(("plain, 1 thread", [(one_thread, plain["rows"])]))
    many.append((f"batched, {options.threads} thread(s)", here))
    many.append((f"batched, {options.workers} worker(s)", on_workers))
    for name, runs in many:
        seconds = sorted(seconds for seconds, _ in runs)[len(runs) // 2]
        rows.append(
            {
                "form": name,
                "seconds": seconds,
                "requests/s": len(given.requests) / seconds,
                "times plain": plain_seconds / seconds,
                "times plain, 1 thread": one_thread / seconds,
                "different verdicts": max(_differing(r, plain["rows"]) for _, r in runs),
            }
        )
    show(
        f"Metrics of {len(given.requests)} requests, {len(pairs)} different continuations",
        rows,
        options,
        f"Log-probabilities differ by at most {apart:.2g}. Medians of several runs.",
    )


def _parts(given: Problem) -> tuple[Any, ...]:
    return given.model, given.tokenizer, given.hparams, given.templates


def _plain(given: Problem) -> dict[str, Any]:
    return plain_evaluate(given.model, given.tokenizer, given.requests)


def _batched(given: Problem) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = evaluate(given.model, given.tokenizer, given.requests)[
        "rows"
    ]
    return rows


def _on_workers(
    pool: WorkerPool, source: ModelSource, given: Problem
) -> Sequence[Mapping[str, Any]]:
    """Measure as a run does, without the greedy answers, which are not figures."""
    answers = Answers(parts_of(given.requests))
    tasks = [Task(str(i), (source, How(), part)) for i, part in enumerate(answers.parts)]
    failed = pool.run("measure", tasks, lambda task, said: answers.take(int(task.key), said))
    assert not failed, failed
    return answers.figures(given.requests)


def _differing(rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of figures of single requests that differ from the plain ones."""
    return sum(
        not (row[name] == other[name] or (row[name] is None and math.isnan(other[name])))
        for row, other in zip(rows, plain, strict=True)
        for name in METRICS
        if rows is not plain
    )


if __name__ == "__main__":
    main()
