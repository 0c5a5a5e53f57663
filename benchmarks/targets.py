"""Targets: the batched form compared with the plain one, on the same requests in the same run.

python -m benchmarks.targets --count 40

With ``--processes 2`` each form is split over two processes, in the shards that a job would have;
the baseline remains the plain form in one process, with as many threads. With ``--dtype bfloat16``
the batched form computes in 16 bits. With ``--whole`` it also runs prompts whole, as for models
that allow no shortcut. With ``--plain 2`` the plain form computes two targets only, of requests
spread over all lengths: on a model of a hundred million parameters each takes half a minute.
``--sizes auto`` leaves out the other batch sizes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness import Problem, arguments, problem, show, timed
from benchmarks.operations import matmul_rate, needed
from pipeline.data import plan_shards
from pipeline.plan import shard_size
from pmet.model import resolve
from pmet.reference import plain_targets
from pmet.targets import Problem as Tokens
from pmet.targets import compute_targets, optimization

BATCH_SIZES = "1,8,64,auto"
RATE_SECONDS = 0.5

# Each process's problem, and the barrier at which the processes wait for each other.
_mine: dict[str, Any] = {}


def main() -> None:
    """Time both forms; report the difference of their targets and the distance to the limit."""
    options = _options()
    given = problem(options)
    shards = _shards(given, options)
    order = [e for shard in shards for e in shard]
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(options.processes)
    pool = ProcessPoolExecutor(options.processes, spawn, _open, (options, barrier))
    with pool:
        runs = _Runs(pool, options.processes)
        chosen = _Sample(order, options.plain)
        plain = runs.in_this_process(_plain, options, chosen.of(shards))
        several = options.processes > 1
        shared = runs.measured(_plain, chosen.of(shards)) if several else None
        forms = [_Batched(size, options.dtype) for size in options.sizes]
        if options.whole:
            forms.append(_Batched(None, options.dtype, whole=True))
        done = [[runs.measured(form, shards) for form in forms] for _ in range(options.repeat)]
    table = _Table(given, order, chosen, plain)
    rows = [table.row("plain", [plain], chosen.requests)]
    if shared:
        rows.append(table.row("plain, split", [shared], chosen.requests))
    for form, several_runs in zip(forms, zip(*done, strict=True), strict=True):
        name = f"batched, {form.size or 'auto'}{', whole prompts' if form.whole else ''}"
        rows.append(table.row(name, several_runs, order))
    count = len(order)
    limit = table.operations(order, done[-1][-1].steps)
    show(
        f"{count} targets, {len(chosen.requests)} of them in the plain form, "
        f"{options.processes} process(es) of {options.threads} thread(s), {options.dtype}",
        rows,
        options,
        f"arithmetic limit {plain.rate * count / limit:.3g} targets/s: "
        f"{limit / count / 1e9:.3g} GFLOP per target, float32 matrix products at "
        f"{plain.rate / 1e9:.3g} GFLOP/s. Medians of several runs; the rate is measured "
        "before and after each.",
    )


def _options() -> argparse.Namespace:
    parser = arguments(__doc__ or "", count=40)
    parser.add_argument("--dtype", default="float32", help="dtype of the batched form's model")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes that share the requests"
    )
    parser.add_argument("--whole", action="store_true", help="also run prompts whole")
    parser.add_argument("--plain", type=int, help="targets of the plain form; default: all")
    parser.add_argument(
        "--sizes", type=_sizes, default=BATCH_SIZES, help=f"batch sizes; default: {BATCH_SIZES}"
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs of each batched form")
    return parser.parse_args()


def _sizes(text: str) -> list[int | None]:
    return [None if size == "auto" else int(size) for size in text.split(",")]


def _shards(given: Problem, options: argparse.Namespace) -> list[list[int]]:
    """Return shards as in a job: similar lengths together, the longest first."""
    templates = [template for group in given.templates for template in group]
    count = len(given.requests)
    shapes = [Tokens.of(given.tokenizer, r, templates).shape for r in given.requests]
    order = sorted(range(count), key=lambda e: (-shapes[e][0], -shapes[e][1], e))
    width = resolve(given.model, given.hparams).value_width
    size = shard_size(count, "auto", width=width) if options.processes > 1 else count
    return [order[shard.start : shard.stop] for shard in plan_shards(count, size)]


class _Sample:
    """The requests that the plain form computes, spread over the order of lengths."""

    def __init__(self, order: Sequence[int], count: int | None) -> None:
        count = len(order) if count is None else max(1, min(count, len(order)))
        self.places = [round((i + 0.5) * len(order) / count - 0.5) for i in range(count)]
        self.requests = [order[place] for place in self.places]

    def of(self, shards: list[list[int]]) -> list[list[int]]:
        """The shards, cut to the sample."""
        kept = set(self.requests)
        return [[e for e in shard if e in kept] for shard in shards if kept.intersection(shard)]


class _Measured:
    """One run of a form: seconds, the machine's rate around that time, and the outcome."""

    def __init__(self, seconds: float, rate: float, results: Sequence[Any]) -> None:
        self.seconds, self.rate = seconds, rate
        self.values = torch.cat([values for values, _ in results])
        self.steps = torch.cat([steps for _, steps in results])


class _Runs:
    """Runs forms over shards in the pool's processes."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self._pool, self._count = pool, count
        self._rate()

    def measured(self, form: Callable[[list[int]], Any], shards: list[list[int]]) -> _Measured:
        before = self._rate()
        seconds, results = timed(lambda: list(self._pool.map(form, shards)))
        return _Measured(seconds, (before + self._rate()) / 2, results)

    def in_this_process(
        self,
        form: Callable[[list[int]], Any],
        options: argparse.Namespace,
        shards: list[list[int]],
    ) -> _Measured:
        """Run the form in this process, with the threads of all processes."""
        _open(options, None)
        torch.set_num_threads(options.threads * self._count)
        before = self._rate()
        seconds, results = timed(lambda: [form(shard) for shard in shards])
        torch.set_num_threads(options.threads)
        return _Measured(seconds, (before + self._rate()) / 2, results)

    def _rate(self) -> float:
        """Return the operations per second of all processes together."""
        return sum(self._pool.map(_rate, range(self._count)))


def _open(options: argparse.Namespace, barrier: Any) -> None:
    _mine["problem"], _mine["barrier"] = problem(options), barrier


def _rate(_number: int) -> float:
    _mine["barrier"].wait()
    return matmul_rate(torch.device("cpu"), torch.float32, 2048, RATE_SECONDS)


def _plain(shard: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    given = _mine["problem"]
    requests = [given.requests[e] for e in shard]
    given.model.to(torch.float32)
    found = plain_targets(given.model, given.tokenizer, requests, given.hparams, given.templates)
    return found.values, found.steps


class _Batched:
    """The batched form at one batch size."""

    def __init__(self, size: int | None, dtype: str, *, whole: bool = False) -> None:
        self.size, self._dtype, self.whole = size, dtype, whole

    def __call__(self, shard: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        given = _mine["problem"]
        chosen = patch.object(optimization, "why_whole", lambda *_: "a benchmark")
        with chosen if self.whole else nullcontext():
            found = compute_targets(
                given.model.to(getattr(torch, self._dtype)),
                given.tokenizer,
                [given.requests[e] for e in shard],
                given.hparams,
                context_templates=given.templates,
                batch_size=self.size,
            )
        return found.values, found.steps


class _Table:
    """Makes the rows of the table; differences are those of the requests in the plain form."""

    def __init__(
        self, given: Problem, order: Sequence[int], chosen: _Sample, plain: _Measured
    ) -> None:
        self._given, self._order, self._chosen, self._plain = given, order, chosen, plain

    def operations(self, order: Sequence[int], steps: torch.Tensor) -> float:
        """Return the number of operations that the targets of requests need."""
        given = self._given
        requests = [given.requests[e] for e in order]
        what = (given.model, given.tokenizer, requests, given.hparams, given.templates)
        return needed(*what, steps.tolist())

    def row(self, name: str, runs: Sequence[_Measured], order: Sequence[int]) -> dict[str, Any]:
        last, plain = runs[-1], self._plain
        same = slice(None) if order is self._chosen.requests else self._chosen.places
        relative = (last.values[same] - plain.values).norm(dim=1) / plain.values.norm(dim=1)
        operations = self.operations(order, last.steps)
        rate = len(order) / statistics.median(run.seconds for run in runs)
        share = statistics.median(operations / run.rate / run.seconds for run in runs)
        return {
            "form": name,
            "targets/s": rate,
            "times plain": rate * plain.seconds / len(plain.steps),
            "of the limit": f"{share:.0%}",
            "equal steps": int((last.steps[same] == plain.steps).sum()),
            "median difference": statistics.median(relative.tolist()),
        }


if __name__ == "__main__":
    main()
