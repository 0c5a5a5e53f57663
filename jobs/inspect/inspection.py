"""An inspection, from a model and facts to a record of where the model holds them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.inspect.summary import summary_of_states, summary_of_traces
from jobs.inspect.views import write_page
from jobs.statistics import pool_of_workers, wanted_workers
from pipeline.cluster import Pool, Task, check_gpus, run_all
from pipeline.data import read_requests
from pipeline.errors import OutputError
from pipeline.events import COMPARE, TRACE, StageName
from pipeline.hyper_parameters import chosen_hparams
from pipeline.models import (
    Checkpoint,
    ModelSource,
    check_configuration,
    checked_digest,
    checked_layout,
    default_cache,
    name_for_nodes,
    open_fast_tokenizer,
    open_model_folder,
    open_skeleton,
)
from pipeline.places import hparams_places, model_places, pattern_places
from pipeline.progress import Progress, Stage
from pipeline.run_folder import versions
from pipeline.storage import Store, is_json_with, now_text, refuse_overlap
from pipeline.workers import TraceTask
from pmet.errors import ArchitectureError, RequestError
from pmet.hparams import PMETHyperParams
from pmet.inspection import (
    NOISE,
    SAMPLES,
    Optimised,
    State,
    Statement,
    Trace,
    default_width,
    states_to_trace,
    window_states,
)
from pmet.model import Layout, contexts
from pmet.presets import depth_of, fitting_preset
from pmet.request import EditRequest

RECORD, PAGE = "inspect.json", "inspect.html"
TRACED, COMPARED = 4, 8
"""Facts in a task. They decide what is computed together, whatever the number of workers."""
MOST_COMPARED = 32
"""Facts that are optimised, at most: each takes as long as the targets of three edits."""
_ROOM = contexts.GENERATED_TOKENS + 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an inspection is made.

    Attributes:
        output: its folder, a path or URL.
        hparams: a preset or the path or URL of a file; None: the preset that fits the model, or the
            published values.
        facts: number of facts, drawn with the seed if there are more.
        samples: noise samples for each fact.
        workers: number of workers, as text; ``auto`` or 0, too.
        gpus_per_worker: GPUs for each.
        address: Ray cluster to run on.
        seed: of the noise, the choice of facts and the context templates.
    """

    output: str
    hparams: str | None = None
    facts: int = 100
    samples: int = SAMPLES
    workers: str = "auto"
    gpus_per_worker: float = 0.0
    address: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Fact:
    """A fact to inspect.

    Attributes:
        row: its input row.
        request: the edit request.
        statement: its prompt with the true object.
    """

    row: int
    request: EditRequest
    statement: Statement


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to inspect, and how.

    Attributes:
        source: the model.
        layout: its layout.
        states: what to restore.
        width: layers in a window.
        hparams: hyper-parameters of the optimisation.
        named: whether their layers are those to optimise for, not those recommended.
        origin: where they are from.
        facts: the facts.
        aside: why other rows are left out, by row.
    """

    source: ModelSource
    layout: Layout
    states: list[State]
    width: int
    hparams: PMETHyperParams
    named: bool
    origin: str
    facts: list[Fact]
    aside: dict[int, str]


@dataclass(frozen=True)
class Inspected:
    """The result of an inspection.

    Attributes:
        store: its folder.
        record: the contents of ``inspect.json``.
    """

    store: Store
    record: dict[str, Any]


def inspect_model(
    model: str, requests: Sequence[str], settings: Settings, *, progress: Progress | None = None
) -> Inspected:
    """Trace facts through a model, optimise them, and write what that shows into a folder.

    Raises:
        InputError: an argument cannot be used, or the model knows none of the facts.
        WorkerError: a task failed for good.
    """
    progress, store = progress or Progress(), Store(settings.output)
    begun = time.monotonic()
    wanted = wanted_workers(settings.workers, settings.gpus_per_worker, settings.address)
    read = [("model", model_places(model)), ("facts", pattern_places(requests))]
    refuse_overlap(("--output", settings.output), [*read, ("hparams", _places(settings.hparams))])
    _refuse_foreign(store)
    with progress.stage(StageName.PLAN):
        check_gpus([wanted], settings.address)
        plan = _plan(model, requests, settings)
    tasks = -(-len(plan.facts) // TRACED)
    with pool_of_workers(plan.source, wanted, tasks, settings.address, progress.event) as pool:
        traces = _traced(plan, settings, pool, progress)
        known = [fact for fact, own in zip(plan.facts, traces, strict=True) if own.known]
        if not known:
            raise RequestError(
                f"the model knows none of {len(plan.facts)} facts: its greedy answer is never "
                "target_true; give facts that it knows"
            )
        tracing = summary_of_traces(plan.states, traces, plan.width)
        hparams = plan.hparams
        if not plan.named:
            hparams = hparams.model_copy(update={"layers": tuple(tracing["window"]["layers"])})
        some = _drawn(known, MOST_COMPARED, settings.seed)
        outcomes = _compared(plan, hparams, settings, some, pool, progress)
    record = {
        **_record(model, plan, settings, traces),
        **tracing,
        "optimisation": summary_of_states(hparams, outcomes, plan.layout.depth),
        "workers": wanted.count,
        "seconds": round(time.monotonic() - begun, 1),
        "versions": versions(),
        "finished_at": now_text(),
    }
    store.write_bytes(PAGE, write_page(record).encode(errors="backslashreplace"))
    store.write_json(RECORD, record)
    return Inspected(store, record)


def _places(hparams: str | None) -> Any:
    return hparams_places(hparams) if hparams else []


def _refuse_foreign(store: Store) -> None:
    """Refuse a folder with files, unless an inspection has written them.

    Raises:
        OutputError: naming the folder.
    """
    own = is_json_with("window", "optimisation")
    if store.list(unfinished=True) and not (store.exists(RECORD) and own(store, RECORD)):
        raise OutputError(
            f"--output: {store.url} holds files, but no inspection; name a folder that is empty or "
            "does not exist"
        )


def _plan(model: str, requests: Sequence[str], settings: Settings) -> _Plan:
    folder = open_model_folder(model, default_cache())
    checkpoint = Checkpoint.open(folder)
    check_configuration(checkpoint)
    skeleton, tokenizer = open_skeleton(folder), open_fast_tokenizer(folder)
    named = settings.hparams is not None or fitting_preset(skeleton.config) is not None
    if named:
        hparams, origin = chosen_hparams(settings.hparams, skeleton.config)
        layout = checked_layout(checkpoint, skeleton, tokenizer, hparams)
        width = len(hparams.layers)
    else:
        origin = "the published values, with the layers recommended here"
        hparams, layout = _found(checkpoint, skeleton, tokenizer)
        width = default_width(layout.depth)
    states = states_to_trace(skeleton, layout, width)
    if not window_states(states, width):
        raise ArchitectureError(
            f"no {width} neighboring layers of this model have the same FFN and attention; name "
            "fewer layers in --hparams"
        )
    facts, aside = _facts(requests, tokenizer, skeleton.config)
    if not facts:
        reasons = "; ".join(list(aside.values())[:3]) or "the files are empty"
        raise RequestError(f"none of {len(aside)} facts can be inspected: {reasons}")
    facts = _drawn(facts, settings.facts, settings.seed)
    digest = checked_digest(checkpoint)
    return _Plan(
        source=ModelSource(
            name_for_nodes(model, folder), settings.gpus_per_worker > 0, digest=digest
        ),
        layout=layout,
        states=states,
        width=width,
        hparams=hparams,
        named=named,
        origin=origin,
        facts=facts,
        aside=aside,
    )


def _drawn(facts: Sequence[Fact], most: int, seed: int) -> list[Fact]:
    """At most some of the facts, drawn with a seed, in their order."""
    drawn = random.Random(seed).sample(range(len(facts)), min(most, len(facts)))
    return [facts[i] for i in sorted(drawn)]


def _found(checkpoint: Checkpoint, skeleton: Any, tokenizer: Any) -> tuple[PMETHyperParams, Layout]:
    """Published values and the model's layout, as a layer near its middle shows it.

    Raises:
        InputError: no layer has the parts that the method needs.
    """
    depth = depth_of(skeleton.config)
    errors: list[ArchitectureError] = []
    for layer in sorted(range(depth), key=lambda layer: abs(2 * layer + 1 - depth)):
        hparams = PMETHyperParams(layers=(layer,))
        try:
            return hparams, checked_layout(checkpoint, skeleton, tokenizer, hparams)
        except ArchitectureError as error:
            errors.append(error)
    raise errors[0]


def _facts(
    requests: Sequence[str], tokenizer: Any, config: Any
) -> tuple[list[Fact], dict[int, str]]:
    """The facts that can be inspected, and why the other rows cannot, by row."""
    table = read_requests(requests)
    aside: dict[int, str] = {int(r.row): r.reason for r in table.rejected}
    facts = []
    for row, request in zip(table.rows, table.requests, strict=True):
        try:
            facts.append(Fact(int(row), request, _statement(tokenizer, request, config)))
        except RequestError as error:
            aside[int(row)] = str(error)
    return facts, aside


def _statement(tokenizer: Any, request: EditRequest, config: Any) -> Statement:
    if request.target_true is None:
        raise RequestError("there is no target_true, the object that the model knows")
    statement = Statement.of(tokenizer, request, request.target_true)
    for one in (statement, Statement.of(tokenizer, request, request.target_new)):
        one.check_length(config, room=_ROOM)
    return statement


def _traced(plan: _Plan, settings: Settings, pool: Pool, progress: Progress) -> list[Trace]:
    subjects = [token for fact in plan.facts for token in fact.statement.subject]

    def task(part: Sequence[Fact]) -> tuple[Any, ...]:
        return (
            TraceTask(
                plan.source,
                plan.layout,
                [fact.statement for fact in part],
                plan.states,
                subjects,
                settings.samples,
                settings.seed,
            ),
        )

    with progress.stage(TRACE, len(plan.facts)) as bar:
        return _in_parts(("trace", "trace"), pool, plan.facts, TRACED, task, bar)


def _compared(
    plan: _Plan,
    hparams: PMETHyperParams,
    settings: Settings,
    facts: Sequence[Fact],
    pool: Pool,
    progress: Progress,
) -> list[Optimised]:
    templates: list[Any] = []

    def task(part: Sequence[Fact]) -> tuple[Any, ...]:
        return plan.source, [fact.request for fact in part], hparams, templates[0]

    with progress.stage(COMPARE, len(facts)) as bar:
        write = Task("context templates", (settings.seed,))
        run_all(pool, "write_templates", [write], lambda _task, value: templates.append(value))
        return _in_parts(("comparison", "optimise_and_compare"), pool, facts, COMPARED, task, bar)


def _in_parts(
    work: tuple[str, str],
    pool: Pool,
    facts: Sequence[Fact],
    size: int,
    task: Callable[[Sequence[Fact]], tuple[Any, ...]],
    bar: Stage,
) -> list[Any]:
    """What the workers return for each fact, in order.

    Args:
        work: its name in messages, and the workers' method.
        pool: the workers.
        facts: the facts.
        size: how many of them are in a task.
        task: the arguments of a task.
        bar: counts facts.
    """
    name, method = work
    found: dict[str, list[Any]] = {}

    def take(done: Task, results: list[Any]) -> None:
        found[done.key] = results
        bar.advance(len(results))

    parts = [facts[start : start + size] for start in range(0, len(facts), size)]
    tasks = [Task(f"{name} {number}", task(part)) for number, part in enumerate(parts)]
    run_all(pool, method, tasks, take)
    return [result for own in tasks for result in found[own.key]]


def _record(model: str, plan: _Plan, settings: Settings, traces: Sequence[Trace]) -> dict[str, Any]:
    """What was inspected, and each fact's figures."""
    return {
        "model": model,
        "digest": plan.source.digest,
        "facts": _counts(plan, traces),
        "seed": settings.seed,
        "noise": {"deviations": NOISE, "samples": settings.samples},
        "depth": plan.layout.depth,
        "width": plan.width,
        "hyper_parameters": plan.origin,
        "rows": list(_rows(plan, traces)),
        "set_aside": [{"row": row, "reason": plan.aside[row]} for row in sorted(plan.aside)],
    }


def _counts(plan: _Plan, traces: Sequence[Trace]) -> dict[str, int]:
    known = sum(trace.known for trace in traces)
    return {
        "inspected": known,
        "not_known": len(traces) - known,
        "set_aside": len(plan.aside),
    }


def _rows(plan: _Plan, traces: Sequence[Trace]) -> Iterator[dict[str, Any]]:
    """What a trace shows of each fact."""
    for fact, trace in zip(plan.facts, traces, strict=True):
        yield {
            "row": fact.row,
            "known": trace.known,
            "clean": trace.clean,
            "corrupted": trace.corrupted if trace.known else None,
            "restored": list(trace.restored),
        }
