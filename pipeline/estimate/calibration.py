"""Calibration of a machine: a few seconds of a job's own work, in plain processes, without Ray.

As many processes as workers would run here do the same kind of work at once, so that the figures
include their effect on each other.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from functools import partial
from statistics import fmean
from typing import Any

from pipeline.cluster import environment, limit_threads
from pipeline.errors import WorkerError
from pipeline.evaluation import How, is_astray
from pipeline.models import ModelSource
from pipeline.workers import Asked, ask
from pmet.errors import PMETError
from pmet.evaluation import Questions
from pmet.hparams import PMETHyperParams
from pmet.model import Contexts, ContextTemplates
from pmet.request import EditRequest, SharedKeys

_FLOPS_WIDTH = 1024
_FEW, _FEW_PROMPTS = 2, 8
_GROWTH = 4


@dataclass(frozen=True)
class Sample:
    """A sample of a job's work.

    Attributes:
        source: the model, as used to compute targets.
        base: the model, as used to measure it.
        requests: as many as a shard has, drawn from the whole job.
        hparams: the method's hyper-parameters.
        templates: context templates; None: the model generates them.
        chat: context templates in the form of chat.
        contexts: which of both are used.
        shared_keys: as in the job.
        batch_size: as in the job; None: as many as fit in memory.
        known: requests to check for knowledge; none if the job does not check.
        how: how requests are measured.
        asked: a part of an evaluation.
        sequences: pieces of the corpus for second moments, if they have to be computed.
        texts: pieces of the corpus for perplexity, if there is one.
        budget_s: time limit in seconds for the targets of the sample, and for its evaluation;
            beyond that, only a few are computed.
        threads: number of threads of each process.
        gpus: the GPUs given to each process.
        started: the `time.time` at which the processes were started.
    """

    source: ModelSource
    base: ModelSource
    requests: Sequence[EditRequest]
    hparams: PMETHyperParams
    templates: ContextTemplates | None
    chat: Sequence[str]
    contexts: Contexts
    shared_keys: SharedKeys
    batch_size: int | None
    known: Sequence[EditRequest]
    how: How
    asked: Asked
    sequences: Sequence[array[int]]
    texts: Sequence[str]
    budget_s: float
    threads: int
    gpus: int
    started: float


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work on this machine, with as many processes as fit running side by side.

    Attributes:
        ready: from the start of a process until its model is open.
        ranks: the additional imports of a rank.
        templates: to generate context templates; 0 if the job names some.
        target: per request, to compute its target.
        key: per request and layer, to read keys.
        measured: per prompt of an evaluation, including its share of answers.
        known: per request, to check whether the model knows it.
        moment: per token of second moments.
        text: per text, for perplexity.
        drawing: to import the libraries that draw the report's charts.
        flop: per operation of a solve, in float64.
        peak_bytes: the peak memory of a process, in bytes.
        diverging: share of the sample's targets that were not found, or ended with a loss far above
            the first one.
    """

    ready: float
    ranks: float
    templates: float
    target: float
    key: float
    measured: float
    known: float
    moment: float
    text: float
    drawing: float
    flop: float
    peak_bytes: float
    diverging: float = 0.0


def calibrate(samples: Sequence[Sample]) -> Rates:
    """Run each sample in a process of its own, all at once, and return the mean rates.

    Raises:
        WorkerError: the model fails at a part of the job's work.
    """
    context = multiprocessing.get_context("spawn")
    # Before any numerical library is imported, as for a worker.
    threads = str(samples[0].threads)
    kind = "cuda" if samples[0].gpus else "cpu"
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "DS_ACCELERATOR": kind}
    if samples[0].gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(_gpu_names()[: samples[0].gpus])
    with (
        environment({**variables, "TOKENIZERS_PARALLELISM": "false"}),
        ProcessPoolExecutor(len(samples), mp_context=context) as processes,
    ):
        found = _results(processes.map(work, samples))
    means = {f.name: fmean(getattr(rates, f.name) for rates in found) for f in fields(Rates)}
    return Rates(**means | {"peak_bytes": max(rates.peak_bytes for rates in found)})


def _results(found: Iterator[Rates]) -> list[Rates]:
    """The processes' measurements, or an error that says in one sentence why there are none."""
    try:
        return list(found)
    except PMETError:
        raise
    except BrokenProcessPool:
        raise WorkerError(
            "a process that tried a little of the job's work was killed, perhaps because memory "
            "ran out; estimate the job on a machine like those that it will run on, or skip the "
            "estimate with --no-estimate"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no message"
        raise WorkerError(
            f"the model fails at a little of the job's own work ({type(error).__name__}: {reason}),"
            " and would fail at all of it; check that transformers runs it, and that its family is "
            "one of those in the README",
            cause_text=str(error.__cause__ or ""),
        ) from error


def _gpu_names() -> list[str]:
    """The GPUs that this process may use, as CUDA names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def work(sample: Sample) -> Rates:
    """Run and time a sample in this process."""
    limit_threads(sample.threads)
    from pmet.evaluation import metrics
    from pmet.model import contexts
    from pmet.update import second_moments

    model, tokenizer = sample.source.open()
    ready = time.time() - sample.started
    templates_s, templates = 0.0, sample.templates
    if templates is None:
        templates_s, written = _timed(lambda: contexts.generate(model, tokenizer, seed=0))
        templates = contexts.combined(written, sample.chat, sample.contexts)
    target_s, diverging = _target_s(model, tokenizer, sample, templates)
    key_s = _key_s(model, tokenizer, sample, templates)
    if sample.base.dtype != sample.source.dtype:
        model, tokenizer = sample.base.open()
    measured_s = _measured_s(model, tokenizer, sample)
    known_s = moment_s = text_s = 0.0
    if sample.known:
        known_s, _ = _timed(lambda: metrics.knows(model, tokenizer, sample.known))
    tokens = sum(map(len, sample.sequences))
    if tokens:
        moment_s, _ = _timed(
            lambda: second_moments.measure_tokens(model, sample.sequences, sample.hparams)
        )
    if sample.texts:
        text_s, _ = _timed(lambda: metrics.score_texts(model, tokenizer, sample.texts))
    return Rates(
        ready=ready,
        ranks=_timed(_import_deepspeed)[0],
        templates=templates_s,
        target=target_s,
        key=key_s,
        measured=measured_s,
        known=known_s / max(1, len(sample.known)),
        moment=moment_s / max(1, tokens),
        text=text_s / max(1, len(sample.texts)),
        drawing=_timed(_import_report)[0],
        flop=_flop_s(),
        peak_bytes=_peak_bytes(),
        diverging=diverging,
    )


def _target_s(
    model: Any, tokenizer: Any, sample: Sample, templates: ContextTemplates
) -> tuple[float, float]:
    """Seconds per target, and the share of computed targets that diverge."""
    from pmet.targets import Targets, compute_targets

    found: list[Targets] = []

    def compute(count: int) -> None:
        targets = compute_targets(
            model,
            tokenizer,
            sample.requests[:count],
            sample.hparams,
            context_templates=templates,
            shared_keys=sample.shared_keys,
            batch_size=sample.batch_size,
        )
        found.append(targets)

    seconds = _each_s(compute, _FEW, len(sample.requests), sample.budget_s)
    # The last requests of a sample are its largest part.
    last = found[-1]
    first_losses = () if last.first_losses is None else last.first_losses.tolist()
    pairs = list(zip(first_losses, last.losses.tolist(), strict=True))
    diverging = sum(is_astray(*pair) or not math.isfinite(pair[1]) for pair in pairs)
    return seconds, diverging / len(pairs)


def _measured_s(model: Any, tokenizer: Any, sample: Sample) -> float:
    asked = sample.asked

    def measure(count: int) -> None:
        # As many prompts, and their share of the rest.
        own = asked.questions
        texts, *questions = (
            part[: -(-len(part) * count // len(asked.prompts))]
            for part in (asked.written, own.stated, own.chat, own.kept)
        )
        some = Asked(asked.prompts[:count], list(texts), Questions(*questions))
        ask(model, tokenizer, sample.how, some)

    return _each_s(measure, _FEW_PROMPTS, len(asked.prompts), sample.budget_s)


def _each_s(work: Callable[[int], None], few: int, count: int, budget_s: float) -> float:
    """Seconds per item, for as many items as time allows: larger batches need less per item."""
    some = min(few, count)
    # The first items pay for the warm-up.
    work(some)
    each = _timed(lambda: work(some))[0] / some
    while some < count:
        some = min(_GROWTH * some, count)
        if some * each > budget_s:
            break
        each = _timed(partial(work, some))[0] / some
    return each


def _key_s(model: Any, tokenizer: Any, sample: Sample, templates: ContextTemplates) -> float:
    """Seconds per key, read as a rank does: in whole passes, layer by layer."""
    import torch

    from pmet.model import resolve
    from pmet.update import LookupTokenizer, reader_kind

    layers = sample.hparams.layers
    tokenizing = LookupTokenizer(tokenizer, templates)
    batches = list(tokenizing.batches(sample.requests))
    layout = resolve(model, sample.hparams)

    def read() -> None:
        reader = reader_kind(model, layout, whole_passes=True)(
            model, layout, layers, tokenizing.shared, batches, model.device, whole_passes=True
        )
        with torch.no_grad():
            for index in range(len(layers)):
                with reader.reading(index):
                    for number in range(len(batches)):
                        reader.read(number)

    return _timed(read)[0] / (len(sample.requests) * len(layers))


def _flop_s() -> float:
    import torch

    square = torch.eye(_FLOPS_WIDTH, dtype=torch.float64)
    return _timed(lambda: square @ square)[0] / (2 * _FLOPS_WIDTH**3)


def _import_deepspeed() -> None:
    from pipeline.zero import deepspeed

    deepspeed()


def _import_report() -> None:
    from pipeline.report import write_report  # noqa: F401


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _peak_bytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
