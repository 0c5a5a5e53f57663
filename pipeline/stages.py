"""The stages of a run. Each finds what the run folder already has, and does only the rest.

    templates ─▶ second moments ─▶ targets ─▶ measure before ─▶ update ─▶ publish ─▶ measure after

Targets and measurements are modules of their own (`pipeline.target_stage`,
`pipeline.measure_stage`). Where a job says so, what the base knows is found before the targets
(`pipeline.known`), and asked again at the end. What is computed together is decided by the plan,
never by who computes it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pipeline.checkpoint import Checkpoint, digest_of_files, publish
from pipeline.errors import NoRoomError, WorkerError
from pipeline.folder import RunFolder
from pipeline.model_cache import model_on_node
from pipeline.moments import check_moments
from pipeline.ownership import CARD, MODEL, PUBLISHED, delete_parts
from pipeline.plan import Plan
from pipeline.progress import CountedStage, Progress, Stage
from pipeline.remedies import MEMORY_OF_RANKS, remedy
from pipeline.replica import ModelSource
from pipeline.shards import Shard
from pipeline.statistics import collect, moments_job
from pipeline.store import Store
from pipeline.tasks import Task
from pipeline.update import LayerReport, UpdateJob, UpdateRank, UpdateShard
from pmet.delta import Edit, checked

if TYPE_CHECKING:
    from pipeline.crew import Crew
    from pipeline.serial import SerialCrew

UPDATE_ATTEMPTS = 3
SHARDS_SENT = 8


@dataclass(frozen=True)
class Context:
    """What every stage works with."""

    plan: Plan
    folder: RunFolder
    crew: Crew | SerialCrew
    progress: Progress

    @property
    def store(self) -> Store:
        """The run folder's files."""
        return self.folder.store

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[tuple[Stage, dict[str, Any]]]:
        """Time a stage in ``run.json`` and show it; yields the bar and the stage's detail."""
        with self.folder.stage(name, total) as detail, self.progress.stage(name, total) as bar:
            yield CountedStage(bar, total, self.folder.progress), detail

    def map(self, method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        """Run a stage's tasks; each result is taken only while the folder is this run's."""

        def take_if_held(task: Task, value: Any) -> None:
            self.folder.check()
            take(task, value)

        self.crew.map(method, tasks, take_if_held)


@dataclass
class FoundTargets:
    """Where the targets are.

    Attributes:
        files: file in the run folder, by number of the shard.
        failures: reason by row of the input, for requests that have no target.
        known: rows of the input that need none, because the base answers them as wanted.
    """

    files: dict[int, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    known: frozenset[int] = frozenset()

    def edited(self, rows: Iterable[int]) -> list[int]:
        """Those of these rows that have a target."""
        return [row for row in rows if row not in self.failures and row not in self.known]


def write_templates(run: Context) -> list[list[str]]:
    """Context templates: those of the job, or what the model writes under the seed."""
    templates = run.plan.templates
    if templates is None:
        if record := run.folder.recorded("context_templates"):
            return list(record["templates"])
        with run.stage("templates", 1) as (bar, _):
            templates = run.crew.one("write_templates", "context templates", (run.plan.job.seed,))
            bar.advance()
    run.folder.check()
    run.store.write_json("context_templates.json", templates)
    run.folder.record("context_templates", {"templates": templates})
    return templates


def moments_url(run: Context) -> str:
    """Where this run's second moments are, or will be."""
    return run.plan.job.second_moments or run.store.join("second_moments")


def collect_moments(run: Context) -> None:
    """Second moments of all edited layers, in one pass over the corpus; kept if already there."""
    plan, url = run.plan, moments_url(run)
    if check_moments(url, plan.layout, plan.hparams.layers, plan.digests["model"]):
        if plan.job.second_moments is None:
            # A run that was killed just before the end has left them.
            delete_parts(Store(url))
        return
    job = moments_job(plan)
    with run.stage("second moments", job.corpus.tokens) as (bar, detail):
        detail |= collect(job, Store(url), run.map, bar)


def check_ranks(run: Context) -> None:
    """Wait for the nodes that the update needs, if there is one to come.

    Raises:
        NoRoomError: the cluster was not large enough in time; nothing has been computed.
    """
    if not all(run.folder.recorded(f"layer-{layer}") for layer in run.plan.hparams.layers):
        run.crew.check_ranks()


def update(run: Context, templates: list[list[str]], found: FoundTargets) -> list[LayerReport]:
    """One batched update of all layers on partitioned weights; a lost group is made anew.

    Nothing is updated, and no report made, where no request is left to be edited.
    """
    if not found.edited(run.plan.table.rows):
        return []
    layers = run.plan.hparams.layers
    done: list[LayerReport] = []
    while len(done) < len(layers):
        record = run.folder.recorded(f"layer-{layers[len(done)]}")
        names = [field.name for field in dataclasses.fields(LayerReport)]
        # What was not checked to be finite when it was recorded is computed again.
        if record is None or not record.keys() >= set(names):
            break
        done.append(LayerReport(**{name: record[name] for name in names}))
    if len(done) < len(layers):
        later = [f"layer-{layer}" for layer in layers[len(done) :]]
        run.folder.forget(*later, PUBLISHED, "measured-after", "known-after")
        with run.stage("update", len(layers)) as (bar, detail):
            bar.skip(len(done))
            detail |= {"ranks": run.crew.ranks, "reused": len(done)}
            _edit_layers_with_retries(run, templates, found, done, bar)
    run.folder.status["layers"] = [dataclasses.asdict(report) for report in done]
    run.folder.write()
    return done


def publish_model(run: Context, reports: list[LayerReport]) -> None:
    """Write the edited checkpoint to ``model/``: the base's files with the edited tensors.

    Without reports these are the base's files as they are.
    """
    plan = run.plan
    if run.folder.recorded(PUBLISHED):
        return
    layers = plan.hparams.layers if reports else ()
    by_tensor = {
        plan.stored[layer].name: report for layer, report in zip(layers, reports, strict=True)
    }

    def edited(name: str, base: torch.Tensor) -> torch.Tensor:
        report = by_tensor[name]
        with run.store.local_copy(report.file) as path:
            return checked(name, base, Edit.load(path).deltas[report.parameter])

    run.folder.forget("measured-after", "known-after")
    digests: dict[str, str] = {}
    base = plan.checkpoint
    if not base.folder.is_dir():
        # Days have passed since it was opened: another run has made room on this disk.
        base = Checkpoint.open(model_on_node(plan.base.folder, plan.base.digest))
    run.folder.clear_model(base.files())
    with run.stage("publish", len(base.files())) as (bar, _):

        def on_file(name: str) -> None:
            run.folder.check()
            if name != CARD:
                digests[f"{MODEL}/{name}"] = run.store.sha256(f"{MODEL}/{name}")
            bar.advance()

        publish(base, by_tensor, edited, run.store, MODEL, on_file=on_file)
    run.folder.record(PUBLISHED, {"files": digests})


def published_model(run: Context) -> ModelSource:
    """The edited checkpoint, for the workers."""
    record = run.folder.recorded(PUBLISHED)
    assert record is not None, "it has been published"
    files = {n.removeprefix(f"{MODEL}/"): digest for n, digest in record["files"].items()}
    return ModelSource(run.store.join(MODEL), run.plan.base.on_gpu, digest=digest_of_files(files))


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
                    f"the update failed {attempt} times; the last time {error}. What was finished "
                    f"is kept: {remedy(str(error), MEMORY_OF_RANKS)}",
                    cause_text=error.cause_text,
                ) from error
            run.folder.event("retry", f"update group, attempt {attempt}: {error}")
            run.progress.event(f"the update group is started again: {error}")
        else:
            return


def _edit_layers(
    run: Context,
    templates: list[list[str]],
    found: FoundTargets,
    done: list[LayerReport],
    bar: Stage,
) -> None:
    """Update the layers that are not done yet, with a new group of ranks."""
    plan, ranks = run.plan, run.crew.ranks
    with run.crew.take_ranks(UpdateRank, (_update_job(run, templates),)) as group:
        # In pieces: the requests of a large job are never all in one message.
        for start in range(0, len(plan.update_shards), ranks * SHARDS_SENT):
            piece = plan.update_shards[start : start + ranks * SHARDS_SENT]
            shards = [_update_shard(plan, shard, found) for shard in piece]
            shards = [shard for shard in shards if shard.requests]
            group.call_each("take_shards", [(shards[rank::ranks],) for rank in range(ranks)])
        for index, report in enumerate(done):
            group.call_all("redo_layer", index, report.file)
        for index, layer in enumerate(plan.hparams.layers[len(done) :], start=len(done)):
            report = group.call_all("edit_layer", index)[0]
            run.folder.record(f"layer-{layer}", dataclasses.asdict(report))
            done.append(report)
            bar.advance()


def expect_update(run: Context, templates: list[list[str]]) -> None:
    """Let the ranks of the update start while the workers end their work, if there is room."""
    run.crew.expect_ranks(UpdateRank, (_update_job(run, templates),))


def _update_job(run: Context, templates: list[list[str]]) -> UpdateJob:
    plan = run.plan
    return UpdateJob(
        model=plan.base.folder,
        model_digest=plan.base.digest,
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
    """As stored on a GPU; float32 on a CPU, where 16-bit arithmetic is slow and coarse."""
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


def sampled(plan: Plan) -> list[int]:
    """Which accepted requests are measured: all, or as many as asked, drawn under the seed."""
    count, wanted = len(plan.table.requests), plan.job.evaluate.sample
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(plan.job.seed).sample(range(count), wanted))
