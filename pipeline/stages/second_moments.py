"""The stage that collects the second moments that a job needs and does not have.

Before any target is computed, it refuses second moments that the update cannot use. If the update
factors them (`pipeline.second_moments.amount`), they are factored here, once: the factor is kept
where the ranks look for it.
"""

from __future__ import annotations

from functools import partial

import torch

from pipeline.cluster import limit_threads
from pipeline.events import CHECK, StageName
from pipeline.plan import Plan
from pipeline.run_folder import delete_parts
from pipeline.second_moments import (
    FactorFile,
    MomentsJob,
    check_moments,
    checked_factor,
    collect,
    factors_second_moments,
    module_name,
    read_moments,
)
from pipeline.stages.context import Context
from pipeline.storage import Store
from pipeline.workers import local_sizes


def moments_url(run: Context) -> str:
    """The location of this run's second moments, which need not exist yet."""
    return run.plan.job.second_moments or run.store.join("second_moments")


def collect_moments(run: Context) -> None:
    """Compute the second moments of all edited layers in one pass, unless they exist.

    Raises:
        JobError: the update cannot use one of them.
    """
    plan, url = run.plan, moments_url(run)
    if check_moments(url, plan.layout, plan.hparams.layers, plan.digests["model"]):
        if plan.job.second_moments is None:
            # A run killed just before it finished has left them.
            delete_parts(Store(url))
        _check_existing(run, url)
        return
    job = moments_job(plan)
    with run.stage(StageName.SECOND_MOMENTS, job.corpus.tokens) as (bar, detail):
        detail |= collect(job, Store(url), run.map, bar, partial(_check, run, "this corpus"))


def _check_existing(run: Context, url: str) -> None:
    """Check second moments that exist, a layer at a time, unless the update is done."""
    plan = run.plan
    layers = plan.hparams.layers
    if all(run.folder.recorded(f"layer-{layer}") for layer in layers) or not _factors(run):
        return
    with run.progress.stage(CHECK, len(layers)) as bar:
        for layer in layers:
            moment_KK = read_moments(url, plan.layout, (layer,))[layer]
            _check(run, url, module_name(plan.layout, layer), moment_KK)
            bar.advance()


def _factors(run: Context) -> bool:
    return factors_second_moments(run.plan.layout, len(run.plan.table.requests))


def _check(run: Context, where: str, module: str, moment_KK: torch.Tensor) -> None:
    """Refuse a second moment that the update would have to factor and cannot.

    Raises:
        JobError: it is not positive definite.
    """
    if not _factors(run):
        return
    kept = FactorFile(moments_url(run), module, moment_KK)
    if kept.exists():
        return
    on_gpu = run.plan.job.update.gpus_per_rank > 0
    # As many threads as a rank has, so that its results do not depend on who factors.
    before = limit_threads(None if on_gpu else local_sizes(run.plan)[2])
    try:
        found = checked_factor(where, module, moment_KK)
    finally:
        limit_threads(before)
    if not on_gpu:
        kept.keep(found)


def moments_job(plan: Plan) -> MomentsJob:
    """The second moments that a plan asks for; it must have a corpus."""
    assert plan.corpus is not None, "the plan refuses a job with neither"
    return MomentsJob(
        source=plan.base,
        model=plan.digests["model"],
        layout=plan.layout,
        hparams=plan.hparams,
        corpus=plan.corpus,
        stored=plan.stored[plan.hparams.target_layer].dtype,
    )
