"""A run from start to finish: plan, stages, gates, results."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from pipeline.cluster import MeteredProgress, asks, check_gpus, crowding, deferred, signals
from pipeline.data import Rejection, RejectionCode, RequestTable, Row
from pipeline.errors import (
    JobError,
    LeaseLostError,
    NothingToEditError,
    OtherJobError,
    RequestTableError,
    StorageError,
)
from pipeline.evaluation import grouped, warnings_of_layers, warnings_of_targets, weights_of
from pipeline.events import EventKind, OnEvent, StageName
from pipeline.job import JobConfig, by_key, dump_job, load_job, outcomes
from pipeline.plan import Plan, make_plan
from pipeline.progress import Progress
from pipeline.report import Tracking, model_card, trackers_of, write_report
from pipeline.run_folder import (
    CARD,
    MODEL,
    NOT_EXCLUSIVE,
    STATUS,
    Lease,
    RunFolder,
    layers,
    refuse_foreign_folder,
)
from pipeline.stages import (
    Context,
    FoundTargets,
    Measurement,
    add_harness,
    answered,
    channel,
    check_ranks,
    collect_moments,
    courses_of,
    find_known,
    find_targets,
    measure,
    measure_harness,
    model_metrics,
    publish_model,
    published_model,
    read_courses,
    refuse_without_edits,
    results_table,
    still_known,
    update_layers,
    write_templates,
)
from pipeline.storage import Store
from pipeline.workers import SerialExecutor
from pmet.errors import InputError, PMETError
from pmet.hparams import ignored_sentence

JOB, REJECTED = "job.yaml", "rejected.parquet"
_SHOWN_VALUE = 60

if TYPE_CHECKING:
    from pipeline.harness import TaskScores
    from pipeline.workers import Executor, KeptWorkers


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: ``complete``, or ``held`` if a gate held the edited model back.
        folder: the run folder.
        metrics: the contents of ``metrics.json``.
    """

    status: Literal["complete", "held"]
    folder: Store
    metrics: dict[str, Any]


def run_job(
    job: JobConfig,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
    address: str | None = None,
    beside: Sequence[str] = (),
    kept: KeptWorkers | None = None,
) -> RunResult:
    """Edit a model as a job specifies, and publish, measure and report the result.

    Args:
        job: the job.
        progress: shows the stages; None shows nothing.
        fresh: start over if the run folder holds earlier work.
        address: Ray cluster to run on; None starts one on this machine.
        beside: names in the run folder that the caller wrote for this run, and that it may read.
        kept: workers on Ray that earlier runs have left there, and that later ones will find.

    Raises:
        InputError: the job cannot be run as it is; no worker has been started.
        FolderBusyError: another run is writing its folder; no worker has been started.
        LeaseLostError: another run has taken over the folder; nothing was written since.
        PMETError: a stage failed; ``run.json`` names it, and the same call resumes.
    """
    progress = progress or Progress()
    with progress.stage(StageName.PLAN):
        plan = plan_run(job, address=address, beside=beside)
    return run_plan(plan, progress=progress, fresh=fresh, address=address, kept=kept)


def plan_run(job: JobConfig, *, address: str | None = None, beside: Sequence[str] = ()) -> Plan:
    """Return the plan of a job that is about to run.

    If no request can be edited, ``rejected.parquet`` in the run folder gives the reason for each.

    Args:
        job: the job.
        address: Ray cluster to run on; with None, the job's GPUs must be on this machine.
        beside: names in the run folder that the caller wrote for this run.

    Raises:
        InputError: the job cannot be run as it is.
        StorageError: a file cannot be read.
    """
    check_gpus(asks(job), address)
    try:
        return make_plan(job, beside=beside)
    except NothingToEditError as error:
        kept = _keep_rejected(job, error)
        where = f"; {kept} has the reason of each" if kept else ""
        raise RequestTableError(f"{error}{where}") from None


def _keep_rejected(job: JobConfig, error: NothingToEditError) -> str | None:
    """Write the rejected rows; return the path, or None if the folder already holds a run."""
    store = Store(job.output)
    with Lease.acquire(store) as lease:
        if store.exists(STATUS) and store.read_json(STATUS).get("digests"):
            return None
        folder = RunFolder(job.output, lease.check)
        folder.begin({}, seed=job.seed)
        store.write_table(REJECTED, error.rejected)
        count = len(error.rejected)
        folder.status["counts"] = {"requested": count, "rejected": count, "edited": 0}
        folder.finish("failed", str(error), exit_status=2)
    return store.join(REJECTED)


def run_plan(
    plan: Plan,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
    address: str | None = None,
    kept: KeptWorkers | None = None,
) -> RunResult:
    """Run a job from its plan; arguments and errors as for ``run_job``."""
    job, progress = plan.job, MeteredProgress(progress or Progress())
    # The plan may have been made a while ago, and the lease is the first file written.
    refuse_foreign_folder(Store(job.output), plan.beside)
    if address is not None and job.in_this_process:
        raise JobError(
            f"the cluster {address} would not be used: the job computes in this process "
            "(targets.workers: 0); name no address, or a number of workers and ranks"
        )
    with Lease.acquire(Store(job.output)) as lease:
        folder = RunFolder(job.output, lease.check)
        try:
            _begin(folder, plan, fresh=fresh)
            progress.begin(folder.store.url, folder.status["attempt"], folder.status["submission"])
            folder.store.write_bytes(JOB, dump_job(job).encode())
            warnings = [*plan.warnings, *crowding(job, address)]
            if not lease.exclusive:
                warnings.insert(0, f"{folder.store.url}: {NOT_EXCLUSIVE}")
            executor = partial(_executor, plan, address, kept)
            return _run_in(folder, plan, progress, executor, warnings)
        except BaseException as error:
            _end_early(folder, error)
            raise


def _begin(folder: RunFolder, plan: Plan, *, fresh: bool) -> None:
    try:
        folder.begin(plan.digests, seed=plan.job.seed, fresh=fresh, origins=plan.origins)
    except OtherJobError as error:
        details = {"job": _changed_settings(folder.store, plan.job)}
        changed = {name: details.get(name, "") for name in error.changed}
        raise OtherJobError(error.url, changed) from None


def _changed_settings(store: Store, job: JobConfig) -> str:
    """Which settings differ from those of the folder's earlier run; empty if unknown."""
    try:
        before = dict(by_key(load_job(store.join(JOB)).identity()))
    except PMETError:
        # An older version may have used other keys.
        return ""
    now = dict(by_key(job.identity()))
    differing = [key for key in now if before.get(key) != now[key]]
    return ", ".join(
        f"{key}: {_said(before.get(key))} before, now {_said(now[key])}" for key in differing
    )


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 1]}…"


def _run_in(
    folder: RunFolder,
    plan: Plan,
    progress: Progress,
    executor_for: Callable[[OnEvent], Executor],
    warnings: Sequence[str],
) -> RunResult:
    on_event = channel(folder, progress)
    for text in warnings:
        on_event(EventKind.WARNING, text)
    if sentence := ignored_sentence(plan.hparams):
        on_event(EventKind.WARNING, f"{plan.job.hparams}: {sentence}")
    for note in plan.table.notes:
        on_event(EventKind.NOTE, note)
    tracking = Tracking(trackers_of(plan.job), on_event)
    tracking.begin(plan.job, folder.status["digest"])
    try:
        with executor_for(on_event) as executor:
            try:
                result = _run_stages(Context(plan, folder, executor, progress))
            except BaseException as error:
                # Before workers are shut down, which may take long if something is broken.
                _end_early(folder, error)
                raise
    except BaseException as error:
        _end_early(folder, error)
        with deferred():
            tracking.end(folder.store, "failed")
        raise
    _tell_end(tracking, folder, result)
    return result


def _executor(
    plan: Plan, address: str | None, kept: KeptWorkers | None, on_event: OnEvent
) -> Executor:
    if plan.job.in_this_process:
        return SerialExecutor(plan, on_event)
    # Imported here: it imports Ray.
    from pipeline.workers import RayExecutor

    return RayExecutor(plan, address, on_event, kept)


def _tell_end(tracking: Tracking, folder: RunFolder, result: RunResult) -> None:
    """Report the end of the run to the trackers; a failure there does not change its result."""
    with suppress(StorageError, LeaseLostError):
        tracking.end(folder.store, result.status)
        if tracking.failed:
            # The trackers' failures are recorded as events.
            folder.write()
            write_report(folder.store)


def _end_early(folder: RunFolder, error: BaseException) -> None:
    """Record in ``run.json`` how a run ended that an error or a signal cut short."""
    if folder.status.get("status") in (None, "failed", "stopped"):
        # The run has not begun, or has recorded its end already.
        return
    # A run that has lost its folder stops here: the status is the other run's to write.
    # If the status cannot be written either, the original error matters more.
    with deferred(), suppress(StorageError, LeaseLostError):
        folder.finish(*how_it_ended(error), exit_status=_exit_status(error))


def how_it_ended(error: BaseException) -> tuple[str, str]:
    """The status and text recorded for work that an error or a signal cut short."""
    # An interrupted library, for example one starting a process, may raise an error of its own.
    if signals.first() is not None or isinstance(error, KeyboardInterrupt | SystemExit):
        return "stopped", "stopped by a signal; the same job goes on from here"
    return "failed", str(error) or type(error).__name__


def _exit_status(error: BaseException) -> int:
    """The exit status of ``pmet run`` for an error."""
    stopped = signals.first() or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
    if stopped is not None:
        return signals.EXIT_BASE + stopped
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, InputError) else 1


def _run_stages(run: Context) -> RunResult:
    check_ranks(run)
    templates = write_templates(run)
    collect_moments(run)
    found = find_targets(run, templates, find_known(run))
    if not found.edited(run.plan.table.rows) and len(found.known) < len(run.plan.table.rows):
        run.store.write_table(REJECTED, _concluded(run.plan, found).rejected_table())
        refuse_without_edits(run, found)
    courses = [read_courses(run.store, found.files[s.index]) for s in run.plan.target_shards]
    _warn(run, warnings_of_targets(_edited_losses(run.plan, found, courses)))
    # By now the ranks of the update are starting up, which takes a while.
    before = measure(run, "before", run.plan.base)
    base_scores = measure_harness(run, "before", run.plan.base)
    reports = update_layers(run, templates, found)
    _warn(run, warnings_of_layers(layers(run.folder.status)))
    publish_model(run, reports)
    edited_model = published_model(run)
    after = measure(run, "after", edited_model, before)
    scores = measure_harness(run, "after", edited_model)
    kept = still_known(run, found.known, edited_model)
    # No worker is needed any more; leaving a cluster takes as long as drawing a report.
    run.executor.dismiss()
    run.folder.sweep("targets", set(found.files.values()))
    run.folder.sweep("delta", {report.file for report in reports})
    return _conclude(run, found, before, after, kept, (base_scores, scores))


def _warn(run: Context, texts: Sequence[str]) -> None:
    for text in texts:
        run.event(EventKind.WARNING, text)


def _edited_losses(
    plan: Plan, found: FoundTargets, courses: Sequence[pa.Table]
) -> list[tuple[int, Any, Any]]:
    """The row, first loss and last loss of each request that is edited."""
    edited = set(found.edited(plan.table.rows))
    return [
        (row, first, last)
        for shard in courses
        for row, _, last, first in courses_of(shard)
        if row in edited
    ]


def _concluded(plan: Plan, found: FoundTargets) -> RequestTable:
    """The input with all rejections: those of the plan, and requests without a target."""
    late = [
        Rejection(row, f"no target: {reason}", RejectionCode.NO_TARGET)
        for row, reason in found.failures.items()
    ]
    rejected = sorted([*plan.table.rejected, *late], key=lambda r: r.row)
    return dataclasses.replace(plan.table, rejected=rejected)


def _conclude(
    run: Context,
    found: FoundTargets,
    before: Measurement,
    after: Measurement,
    kept: Collection[Row],
    scores: tuple[list[TaskScores], list[TaskScores]],
) -> RunResult:
    """Write results, metrics, model card and report, and evaluate the gates."""
    plan, store = run.plan, run.store
    run.folder.check()
    table = _concluded(plan, found)
    edited = sorted(found.edited(table.rows))
    metrics = model_metrics(before, after, edited)
    add_harness(metrics, plan.harness, *scores)
    measured = {"before": before.rows, "after": after.rows}
    counted = [row for row in edited if row in after.rows]
    if groups := grouped(plan.group_by, plan.table.table, counted, measured):
        metrics["groups"] = groups
    metrics["weights"] = weights_of(layers(run.folder.status))
    if plan.last:
        metrics["last"] = dataclasses.asdict(plan.last)
    metrics["counts"] = {
        "requested": len(table.table),
        "rejected": len(table.rejected),
        "edited": len(edited),
    }
    if plan.job.skip_known:
        metrics["counts"]["known"] = len(found.known)
        share = len(kept) / len(found.known) if found.known else None
        metrics["known"] = {"still_answered": share}
    # If all facts were known, the model is the base model, and there is nothing to hold back.
    nothing_new = len(found.known) == len(table.rows)
    thresholds = {} if nothing_new else plan.job.gates.thresholds()
    metrics["gates"] = outcomes(thresholds, metrics, plan.last.after if plan.last else None)
    held = any(not gate["passed"] for gate in metrics["gates"])
    targets = [read_courses(store, found.files[shard.index]) for shard in plan.target_shards]
    # All known requests were asked, including those not drawn for measurement.
    store.write_table(
        "results.parquet",
        results_table(
            table,
            dict.fromkeys(edited, "edited") | dict.fromkeys(found.known, "known"),
            targets,
            answered(found.known, found.known) | before.rows,
            answered(found.known, kept) | after.rows,
        ),
    )
    store.write_table(REJECTED, table.rejected_table())
    store.write_json("metrics.json", metrics)
    run.folder.status["counts"] = metrics["counts"]
    status: Literal["complete", "held"] = "held" if held else "complete"
    card = model_card(dump_job(plan.job), run.folder.status, metrics)
    store.write_bytes(f"{MODEL}/{CARD}", card.encode())
    run.folder.finish(status, exit_status=3 if held else 0)
    write_report(store)
    return RunResult(status, store, metrics)
