"""The stage that collects the second moments that a job needs and does not have."""

from __future__ import annotations

from pipeline.events import StageName
from pipeline.plan import Plan
from pipeline.run_folder import delete_parts
from pipeline.second_moments import MomentsJob, check_moments, collect
from pipeline.stages.context import Context
from pipeline.storage import Store


def moments_url(run: Context) -> str:
    """The location of this run's second moments, which need not exist yet."""
    return run.plan.job.second_moments or run.store.join("second_moments")


def collect_moments(run: Context) -> None:
    """Compute the second moments of all edited layers in one pass, unless they exist."""
    plan, url = run.plan, moments_url(run)
    if check_moments(url, plan.layout, plan.hparams.layers, plan.digests["model"]):
        if plan.job.second_moments is None:
            # A run killed just before it finished has left them.
            delete_parts(Store(url))
        return
    job = moments_job(plan)
    with run.stage(StageName.SECOND_MOMENTS, job.corpus.tokens) as (bar, detail):
        detail |= collect(job, Store(url), run.map, bar)


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
