"""The stage that edits the layers: one batched update on partitioned weights, layer by layer."""

from __future__ import annotations

import dataclasses

import torch

from pipeline.data import Shard
from pipeline.errors import NoRoomError, WorkerError
from pipeline.events import EventKind, StageName
from pipeline.failures import MEMORY_OF_RANKS, remedy
from pipeline.plan import Plan
from pipeline.progress import Stage
from pipeline.run_folder import OF_EDITED, PUBLISHED
from pipeline.stages.context import Context, FoundTargets
from pipeline.stages.second_moments import moments_url
from pipeline.zero import LayerReport, UpdateJob, UpdateRank, UpdateShard

UPDATE_ATTEMPTS = 3
SHARDS_SENT = 8


def check_ranks(run: Context) -> None:
    """Wait for the nodes that the update needs, if they are still to join.

    Raises:
        NoRoomError: the cluster did not grow large enough in time; nothing has been computed.
    """
    if sum(report.solves for report in _finished(run)) < _steps(run.plan):
        run.executor.check_ranks()


def update_layers(
    run: Context, templates: list[list[str]], found: FoundTargets
) -> list[LayerReport]:
    """Edit all layers in one batched update on partitioned weights; replace a lost group of ranks.

    Returns:
        A report per layer; none if no request is left to edit.
    """
    if not found.edited(run.plan.table.rows):
        return []
    layers, done = run.plan.hparams.layers, _finished(run)
    steps, wanted = sum(report.solves for report in done), _steps(run.plan)
    if steps < wanted:
        run.folder.forget(*(f"layer-{layer}" for layer in layers[len(done) :]))
        run.folder.forget(PUBLISHED, *OF_EDITED)
        with run.stage(StageName.UPDATE, wanted) as (bar, detail):
            bar.skip(steps)
            detail |= {"ranks": run.executor.ranks, "reused": steps}
            _edit_layers_with_retries(run, templates, found, done, bar)
    run.folder.status["layers"] = [dataclasses.asdict(report) for report in done]
    run.folder.write()
    return done


def _steps(plan: Plan) -> int:
    return plan.hparams.solves * len(plan.hparams.layers)


def _finished(run: Context) -> list[LayerReport]:
    """What is recorded of the first layers; the layers after them begin anew.

    Nothing, if the records cannot be of layers that were solved for in turn: some are lost.
    """
    done: list[LayerReport] = []
    names = {field.name for field in dataclasses.fields(LayerReport)}
    for layer in run.plan.hparams.layers:
        record = run.folder.recorded(f"layer-{layer}")
        # Records of earlier versions lack fields; their layers are computed again.
        if record is None or not record.keys() >= names:
            break
        done.append(LayerReport(**{name: record[name] for name in names}))
    solves = [report.solves for report in done]
    expected = _in_turn(sum(solves), len(run.plan.hparams.layers))
    return done if solves == expected[: len(done)] else []


def _in_turn(steps: int, layers: int) -> list[int]:
    """How often each layer has been solved for after so many steps."""
    turns, index = divmod(steps, layers)
    return [turns + (number < index) for number in range(layers)]


def expect_update(run: Context, templates: list[list[str]]) -> None:
    """Start the ranks of the update while the workers finish, if there is room."""
    run.executor.expect_ranks(UpdateRank, (_update_job(run, templates),))


def _edit_layers_with_retries(
    run: Context,
    templates: list[list[str]],
    found: FoundTargets,
    done: list[LayerReport],
    bar: Stage,
) -> None:
    for attempt in range(1, UPDATE_ATTEMPTS + 1):
        try:
            _edit_layers(run, templates, found, done, bar)
        except NoRoomError:
            raise
        except WorkerError as error:
            if attempt == UPDATE_ATTEMPTS:
                raise WorkerError(
                    f"the update failed {attempt} times; the last time {error}. Finished work "
                    f"is kept: {remedy([error.kind], MEMORY_OF_RANKS)}",
                    cause_text=error.cause_text,
                    kind=error.kind,
                ) from error
            run.event(
                EventKind.RETRY,
                f"the update group is started again after attempt {attempt}: {error}",
                attempt=attempt,
            )
        else:
            return


def _edit_layers(
    run: Context,
    templates: list[list[str]],
    found: FoundTargets,
    done: list[LayerReport],
    bar: Stage,
) -> None:
    """Update the layers that are not finished yet, with a new group of ranks."""
    plan, ranks = run.plan, run.executor.ranks
    bar.note("starting the ranks")
    with run.executor.take_ranks(UpdateRank, (_update_job(run, templates),)) as group:
        # In pieces: the requests of a large job are never all in one message.
        for start in range(0, len(plan.update_shards), ranks * SHARDS_SENT):
            piece = plan.update_shards[start : start + ranks * SHARDS_SENT]
            shards = [_update_shard(plan, shard, found) for shard in piece]
            shards = [shard for shard in shards if shard.requests]
            group.call_each("take_shards", [(shards[rank::ranks],) for rank in range(ranks)])
        for index, report in enumerate(done):
            group.call_all("redo_layer", index, report.file)
        layers, solves = plan.hparams.layers, plan.hparams.solves
        for step in range(sum(report.solves for report in done), _steps(plan)):
            turn, index = divmod(step, len(layers))
            bar.note(f"layer {layers[index]}" + (f", solve {turn + 1} of {solves}" if turn else ""))
            held = done[index] if turn else None
            report = group.call_all("edit_layer", index, held)[0]
            run.folder.record(f"layer-{layers[index]}", dataclasses.asdict(report))
            done[index : index + 1] = [report]
            bar.advance()


def _update_job(run: Context, templates: list[list[str]]) -> UpdateJob:
    plan = run.plan
    return UpdateJob(
        model=plan.base.folder,
        model_digest=plan.base.digest,
        layout=plan.layout,
        hparams=plan.hparams,
        templates=templates,
        second_moments=moments_url(run),
        run=run.store,
        device="cuda" if plan.job.update.gpus_per_rank else "cpu",
        dtype=_rank_dtype(plan),
        stored={layer: tensor.dtype for layer, tensor in plan.stored.items()},
        offload=plan.job.update.offload,
    )


def _rank_dtype(plan: Plan) -> torch.dtype:
    """The stored dtype on a GPU; float32 on a CPU, where 16-bit is slow and imprecise."""
    if not plan.job.update.gpus_per_rank:
        return torch.float32
    return plan.stored[plan.hparams.target_layer].dtype


def _update_shard(plan: Plan, shard: Shard, found: FoundTargets) -> UpdateShard:
    table = plan.table
    edited = set(found.edited(table.rows[shard.start : shard.stop]))
    kept = [i for i in range(shard.start, shard.stop) if table.rows[i] in edited]
    overlapping = [
        other
        for other in plan.target_shards
        if other.start < shard.stop and other.stop > shard.start
    ]
    return UpdateShard(
        name=shard.name,
        requests=[table.requests[i] for i in kept],
        rows=[table.rows[i] for i in kept],
        files=[found.files[other.index] for other in overlapping],
    )
