"""Predicted duration of a job and memory of its processes, from rates measured here."""

from __future__ import annotations

import heapq
import math
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch

from pipeline.cluster import fit_gpus
from pipeline.data import Place
from pipeline.errors import JobError
from pipeline.estimate.calibration import Rates, Sample, calibrate
from pipeline.evaluation import How
from pipeline.events import StageName
from pipeline.plan import Plan
from pipeline.second_moments import check_moments
from pipeline.stages import (
    BLOCK,
    answering,
    held_out_of,
    moments_job,
    parts_of,
    parts_of_texts,
    sampled,
    work_of_texts,
)
from pipeline.workers import WORTH_A_GPU, Asked, local_sizes, stored_bytes, updated_soon, worth
from pmet.request import EditRequest
from pmet.update import cheaper_form

BUDGET_S = 10.0
_SAMPLED_TOKENS = 4096
_SAMPLED_TEXTS = 8
_ASKED_WHAT_IT_KNOWS = 32
# In units of the time a process needs to open its model, measured on quiet machines: the command
# itself, which imports the same as a worker; Ray's own processes; ranks that meet and share out.
_COMMAND_STARTS = 0.8
_RAY_STARTS = 1.1
_RANKS_START = 1.5
_MOST_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a job.

    Attributes:
        stages: seconds per stage, in order.
        worker_bytes: memory of each target worker.
        rank_bytes: memory of each rank of the update.
        workers: number of workers that compute targets.
        ranks: ranks of the update.
        side_by_side: number of processes used to measure the machine.
        by_workers: seconds of the whole run by number of workers, if each worker and each rank has
            a core, or a GPU, of its own.
        diverging: share of the sampled targets that were not found, or ended with a loss far above
            the first one.
    """

    stages: dict[str, float]
    worker_bytes: float
    rank_bytes: float
    workers: int
    ranks: int
    side_by_side: int
    by_workers: dict[int, float]
    diverging: float = 0.0

    @property
    def seconds(self) -> float:
        """Total seconds for the whole run."""
        return sum(self.stages.values())


def estimate(plan: Plan, *, budget_s: float = BUDGET_S) -> Estimate:
    """Measure this machine with a little of the job's own work, and predict the cost of all of it.

    Work that earlier attempts or shared stores already hold is included.

    Args:
        plan: the job's plan.
        budget_s: time limit in seconds for a sample of targets.

    Raises:
        JobError: the job needs GPUs and this machine has none, or too little memory for the model.
    """
    if plan.base.on_gpu and not torch.cuda.is_available():
        raise JobError(
            "the job needs GPUs and this machine has none: estimate it on a machine like those "
            "that it will run on"
        )
    workers, ranks, threads = _sizes(plan)
    cores = max(1, (os.cpu_count() or 1) // threads)
    side_by_side = min(1 if plan.base.on_gpu else min(workers, cores), _replicas_that_fit(plan))
    work = _Work.of(plan)
    rates = calibrate(_samples(plan, work, side_by_side, threads, budget_s))
    # On this machine, processes share cores if there are more of them.
    crowd = max(1.0, workers / cores)
    alone = {
        count: sum(_stages(plan, work, rates, count, ranks, 1.0, 1.0).values())
        for count in _numbers(len(plan.target_shards))
    }
    return Estimate(
        by_workers=alone,
        stages=_stages(plan, work, rates, workers, ranks, crowd, max(1.0, ranks / cores)),
        worker_bytes=rates.peak_bytes,
        rank_bytes=_rank_bytes(plan, rates, ranks),
        workers=workers,
        ranks=ranks,
        side_by_side=side_by_side,
        diverging=rates.diverging,
    )


def _sizes(plan: Plan) -> tuple[int, int, int]:
    """Workers, ranks, and threads per process; GPUs are counted here if the job does not say."""
    targets, update = plan.job.targets, plan.job.update
    workers, ranks, threads = local_sizes(plan)
    gpus = torch.cuda.device_count()
    if targets.workers == "auto" and targets.gpus_per_worker:
        workers = max(1, fit_gpus(targets.gpus_per_worker, gpus))
    if update.ranks == "auto" and update.gpus_per_rank:
        ranks = min(gpus, worth(plan, WORTH_A_GPU))
    elif updated_soon(plan):
        ranks = 1
    return min(workers, len(plan.target_shards)), ranks, threads


def _numbers(shards: int) -> list[int]:
    """Numbers of workers worth listing: powers of two, and the number of shards."""
    return [*(1 << power for power in range((shards - 1).bit_length())), shards]


def _replicas_that_fit(plan: Plan) -> int:
    """How many replicas fit in this machine's free memory, leaving some for other programs."""
    needed, free = _model_bytes(plan), psutil.virtual_memory().available
    if needed > _MOST_OF_MEMORY * free:
        raise JobError(
            f"the model takes {needed / 2**30:.1f} GiB and this machine has {free / 2**30:.1f} GiB "
            "free: estimate the job on a machine like those that it will run on"
        )
    return int(_MOST_OF_MEMORY * free / needed)


def _model_bytes(plan: Plan) -> float:
    """The memory of one replica: as stored on a GPU, in float32 on a CPU."""
    stored = float(stored_bytes(plan))
    itemsize = plan.stored[plan.hparams.target_layer].dtype.itemsize
    return stored if plan.base.on_gpu else stored * 4 / itemsize


@dataclass(frozen=True)
class _Work:
    """The work of a job that workers share besides the targets.

    Attributes:
        asked: the evaluations before and after, in parts.
        texts: the texts that perplexity is measured on; none without a corpus.
        corpus: parts of the corpus for second moments; none if these exist already.
    """

    asked: list[Asked]
    texts: list[str]
    corpus: list[list[array[int]]]

    @classmethod
    def of(cls, plan: Plan) -> _Work:
        """All of a plan's work; splitting a large job takes a while."""
        requests = [plan.table.requests[place] for place in sampled(plan)]
        writing = How.of(plan.job.evaluate, plan.job.seed).writing_seed is not None
        blocks = [requests[start : start + BLOCK] for start in range(0, len(requests), BLOCK)]
        texts = held_out_of(plan)
        answered = _answering(plan, requests, texts)
        asked = [
            part
            for block in blocks
            for part in parts_of(
                block, writing=writing, answering=[r for r in block if id(r) in answered]
            )
        ]
        if plan.corpus is None:
            return cls(asked, [], [])
        return cls(asked, texts, moments_job(plan).parts() if _moments_wanted(plan) else [])


def _answering(plan: Plan, requests: list[EditRequest], texts: list[str]) -> set[int]:
    """The identities of the requests that the models answer in their own words."""
    wanted, work = plan.job.evaluate.answers, work_of_texts(texts)
    numbers = answering(len(requests), requests.__getitem__, wanted, work, plan.job.seed)
    return {id(requests[number]) for number in numbers}


def _samples(plan: Plan, work: _Work, count: int, threads: int, budget_s: float) -> list[Sample]:
    """``count`` samples, each drawn from the whole job."""
    requests = plan.table.requests
    size = max(1, round(len(requests) / len(plan.target_shards)))
    places = [len(requests) * i // (size * count) for i in range(size * count)]
    sequences, total = [], 0
    for sequence in work.corpus[0] if work.corpus else []:
        sequences.append(sequence)
        total += len(sequence)
        if total > _SAMPLED_TOKENS:
            break
    texts = work.texts
    known = sampled(plan)[:_ASKED_WHAT_IT_KNOWS] if plan.job.skip_known else []
    how = How.of(plan.job.evaluate, plan.job.seed)
    return [
        Sample(
            source=plan.target_source,
            base=plan.base,
            requests=plan.learned([Place(place) for place in places[number::count]]),
            hparams=plan.hparams,
            templates=plan.templates,
            chat=plan.chat,
            contexts=plan.job.contexts,
            shared_keys=plan.job.targets.shared_keys,
            batch_size=plan.batch_size,
            known=[requests[place] for place in known],
            how=how,
            asked=work.asked[0],
            sequences=sequences,
            texts=texts[:: max(1, len(texts) // _SAMPLED_TEXTS)][:_SAMPLED_TEXTS],
            budget_s=budget_s,
            threads=threads,
            gpus=math.ceil(plan.job.targets.gpus_per_worker),
            started=time.time(),
        )
        for number in range(count)
    ]


def _stages(
    plan: Plan,
    work: _Work,
    rates: Rates,
    workers: int,
    ranks: int,
    crowd: float,
    rank_crowd: float,
) -> dict[str, float]:
    count = len(plan.table.requests)
    prompts = [len(part.prompts) for part in work.asked]
    measure = _in_turn(prompts, workers) * rates.measured * crowd
    measure += _in_turn(list(map(len, parts_of_texts(work.texts))), workers) * rates.text * crowd
    known = count * rates.known / workers * crowd
    starts = _COMMAND_STARTS + _RAY_STARTS + crowd
    start = (1.0 if plan.job.in_this_process else starts) * rates.ready
    stages = {"start": start, StageName.TEMPLATES: rates.templates}
    if work.corpus:
        sizes = [sum(map(len, part)) for part in work.corpus]
        stages[StageName.SECOND_MOMENTS] = _in_turn(sizes, workers) * rates.moment * crowd
    stages["known"] = 2 * known
    shards = [len(shard) for shard in plan.target_shards]
    stages[StageName.TARGETS] = _in_turn(shards, workers) * rates.target * crowd
    stages[StageName.MEASURE_BEFORE] = measure
    passes = plan.hparams.solves * len(plan.hparams.layers)
    keys = count * passes * rates.key / ranks * rank_crowd
    ready = _RANKS_START * (rates.ready + rates.ranks) * rank_crowd
    if plan.job.in_this_process or updated_soon(plan):
        ready = rates.ready
    elif not plan.job.update.gpus_per_rank:
        # If they need no worker's GPU, they start while the last shards are computed.
        ready = max(0.0, ready - max(shards) * rates.target * crowd - measure)
    stages[StageName.UPDATE] = ready + keys + _operations(plan, ranks) * rates.flop
    stages[StageName.MEASURE_AFTER] = measure
    stages["report"] = 2 * rates.drawing
    return {name: seconds for name, seconds in stages.items() if seconds}


def _in_turn(sizes: Sequence[int], workers: int) -> int:
    """The work of the busiest worker when pieces of these sizes are handed out in turn."""
    busy = [0] * max(1, workers)
    for size in sizes:
        heapq.heappush(busy, heapq.heappop(busy) + size)
    return max(busy)


def _operations(plan: Plan, ranks: int) -> float:
    """Multiplications and additions of all solves, on one rank."""
    count, layers = len(plan.table.requests), plan.hparams.solves * len(plan.hparams.layers)
    keys, values = plan.layout.key_width, plan.layout.value_width
    if stacked := plan.layout.family.stacked:
        # Ranks share the experts; each needs the factor of its K×K matrix.
        each = keys**3 / 3 + 2 * keys**2 * values
        adding = 2 * count * stacked.per_token * keys * (keys + values)
        return layers * (plan.layout.experts * each + adding) / ranks
    # Each rank needs the factor of a K×K matrix in either form.
    operations = keys**3 / 3
    if cheaper_form(count, keys, values, factored=False) == "keys":
        operations += 2 * keys**2 * values / ranks + 2 * count * keys * (keys + values) / ranks
    else:
        operations += 2 * keys**2 * count / ranks + count**3 / 3 + 2 * count * keys * values / ranks
    return operations * layers


def _rank_bytes(plan: Plan, rates: Rates, ranks: int) -> float:
    """The memory of a process without a model, its slice of the model, and its matrices."""
    held = _model_bytes(plan)
    libraries = max(0.0, rates.peak_bytes - held)
    layout = plan.layout
    if layout.experts:
        # The second moments in float32, and the sums of its requests for every expert.
        each = (4 + 8) * layout.key_width**2 + 8 * layout.key_width * layout.value_width
        return libraries + held / ranks + float(layout.experts * each)
    return libraries + held / ranks + 3 * 8.0 * layout.key_width**2


def _moments_wanted(plan: Plan) -> bool:
    url = plan.job.second_moments
    layers, model = plan.hparams.layers, plan.digests["model"]
    return url is None or not check_moments(url, plan.layout, layers, model)
