"""Terminal output of the commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipeline.evaluation import (
    duration,
    figure_of,
    is_number,
    read_gate,
    show_special,
    show_tasks,
)
from pipeline.job import dump_job
from pmet.evaluation import ANSWERED

if TYPE_CHECKING:
    from pipeline.estimate import Estimate
    from pipeline.plan import Plan
    from pipeline.run import RunResult
    from pmet.model import Layout

SHOWN_REJECTIONS = 10


def show_plan(plan: Plan, console: Console) -> None:
    """Print the resolved job, the shard plan and the rejected rows."""
    console.print(dump_job(plan.job), markup=False, soft_wrap=True)
    table = Table("", "", show_header=False, box=None)
    for name, value in _facts(plan).items():
        table.add_row(name, value)
    console.print(table)
    for warning in plan.warnings:
        console.print(f"  warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for note in plan.table.notes:
        console.print(f"  note: {note}", markup=False, soft_wrap=True)
    for rejection in plan.table.rejected[:SHOWN_REJECTIONS]:
        console.print(f"  row {rejection.row}: {rejection.reason}", markup=False, soft_wrap=True)
    if (more := len(plan.table.rejected) - SHOWN_REJECTIONS) > 0:
        console.print(f"  and {more} more")


def show_estimate(found: Estimate, console: Console) -> None:
    """Print the time and memory that a job is expected to take."""
    table = Table("", "estimated", box=None, title="Estimate", title_justify="left")
    for name, seconds in found.stages.items():
        table.add_row(name, duration(seconds))
    table.add_row("total", duration(found.seconds))
    table.add_row("memory per worker", f"{found.worker_bytes / 2**30:.2f} GiB × {found.workers}")
    table.add_row("memory per rank", f"{found.rank_bytes / 2**30:.2f} GiB × {found.ranks}")
    table.add_row("targets that diverge", f"{percent(found.diverging)} of the sample")
    table.add_row("‖Δ‖/‖W‖", "known after the update")
    console.print(table)
    if found.diverging:
        console.print(
            "some targets of the sample were not found, or their loss ended far above where it "
            "started: lower v_lr or clamp_norm_factor in the hyper-parameters",
            style="yellow",
        )
    console.print(
        "\nOn a cluster where each worker has a core or GPU like this machine's to itself"
    )
    others = Table("workers", "time", "workers × time", box=None)
    for count, seconds in found.by_workers.items():
        others.add_row(str(count), duration(seconds), duration(count * seconds))
    console.print(others)
    console.print(
        f"based on this machine's speed with {found.side_by_side} concurrent processes; "
        "work that earlier runs finished is included",
        style="dim",
    )


def show_result(result: RunResult, console: Console) -> None:
    """Print counts, scores, gates and the locations of the files."""
    counts = result.metrics["counts"]
    console.print(
        f"{counts['edited']} facts edited, {counts['rejected']} of {counts['requested']} rows "
        "rejected"
    )
    if counts.get("known"):
        kept = percent(result.metrics["known"]["still_answered"])
        console.print(
            f"{counts['known']} were already known and not edited; {kept} of them still are"
        )
    show_scores(result.metrics["before"], result.metrics["after"], console)
    show_harness(result.metrics, console)
    for gate in result.metrics["gates"]:
        if not gate["passed"]:
            console.print(f"held back: {gate_text(gate)}", style="red")
        elif "note" in gate:
            console.print(f"{read_gate(gate).name}: {gate['note']}")
    for name in ("model", "report.html", "results.parquet", "delta"):
        console.print(f"{name:16} {result.folder.join(name)}", markup=False, soft_wrap=True)


def show_scores(
    before: Mapping[str, float | None], after: Mapping[str, float | None], console: Console
) -> None:
    """Print a model's figures before and after the edit: first, what it says."""
    said = Table("in its own words", "before", "after")
    for name in ANSWERED:
        if after.get(name) is not None:
            figures = (percent(m.get(name)) for m in (before, after))
            said.add_row(figure_of(name).label, *figures)
    if said.row_count:
        console.print(said)
    table = Table("", "before", "after", "before, strict", "after, strict")
    for name in ("efficacy", "generalization", "specificity"):
        strict = f"{name}_strict"
        table.add_row(name, *(percent(m[k]) for k in (name, strict) for m in (before, after)))
    table.add_row("score", percent(before["score"]), percent(after["score"]), "", "")
    if after.get("perplexity") is not None:
        values = [plain(m.get("perplexity")) for m in (before, after)]
        table.add_row("perplexity", *values, "", "")
    console.print(table)


def show_harness(metrics: Mapping[str, Any], console: Console) -> None:
    """Print the scores of tasks of lm-evaluation-harness before and after the edit, if any."""
    table = Table(
        Column("general abilities", overflow="fold"),
        Column("metric", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("before", "after", "change", "95 %")),
    )
    for task in show_tasks(metrics):
        values = (task.before, task.after, task.change, task.interval)
        table.add_row(Text(task.name), Text(task.metric), *values)
    if table.row_count:
        console.print(table)


def percent(value: float | None) -> str:
    """Format a fraction as a percentage; a dash if it was not measured."""
    return f"{100 * value:.1f} %" if is_number(value) else show_special(value)


def plain(value: float | None) -> str:
    """Format a plain number for people."""
    return f"{value:.3f}" if is_number(value) else show_special(value)


def gate_text(gate: Mapping[str, Any]) -> str:
    """Describe what a gate measured and what it requires."""
    read = read_gate(gate)
    if gate.get("note"):
        return f"{read.name} is {read.reached}; the gate requires {read.asked}"
    return f"{read.name} is {read.reached}, the gate requires {read.asked}"


def _facts(plan: Plan) -> dict[str, str]:
    count = len(plan.table.requests)
    corpus = plan.corpus
    return {
        "requests": f"{count} to edit, {len(plan.table.rejected)} rejected",
        "shared keys": _shared_keys(plan),
        "target shards": _sizes(list(map(len, plan.target_shards))),
        "update shards": _sizes(list(map(len, plan.update_shards))),
        "batch size": str(plan.batch_size or "auto"),
        "layers": ", ".join(map(str, plan.hparams.layers)),
        **plan.origins,
        "edited weights": _weights(plan.layout),
        **_model_facts(plan),
        "corpus": f"{len(corpus.texts):,} texts, {corpus.tokens:,} tokens" if corpus else "none",
        "model digest": plan.digests["model"],
        **_hparams_facts(plan),
        **_harness_facts(plan),
    }


def _harness_facts(plan: Plan) -> dict[str, str]:
    """Return how much is asked of lm-evaluation-harness; the estimate leaves it out."""
    if plan.harness is None:
        return {}
    count = len(plan.harness.keys)
    tasks = "1 task" if count == 1 else f"{count:,} tasks"
    return {
        "harness": f"{tasks} with {plan.harness.total:,} requests for each model, which the time "
        "estimate leaves out"
    }


def _weights(layout: Layout) -> str:
    shape = f"{layout.value_width} × {layout.key_width}"
    if (stacked := layout.family.stacked) is None:
        return shape
    return (
        f"{shape} in each of {layout.experts} routed experts; each token is routed to "
        f"{stacked.per_token} of them"
    )


def _model_facts(plan: Plan) -> dict[str, str]:
    """Return where the edit applies, how that is known, and how prompts are run."""
    names = plan.layout.family
    return {
        "edited module": f"{names.down_projection} ({plan.parts[names.down_projection]})",
        "attention output": f"{names.attention_projection} "
        f"({plan.parts[names.attention_projection]})",
        "prompts": "run from the subject's last token"
        if plan.whole is None
        else f"run whole, which is slower: the family's code allows no shortcut ({plan.whole})",
    }


def _hparams_facts(plan: Plan) -> dict[str, str]:
    """Return the hyper-parameters that were defaulted, ignored or renamed, if any."""
    hparams = plan.hparams
    facts = {
        "default values": ", ".join(f"{key} {value:g}" for key, value in hparams.defaulted.items()),
        "ignored keys": ", ".join(hparams.ignored),
    }
    return {name: value for name, value in facts.items() if value}


def _shared_keys(plan: Plan) -> str:
    if not plan.sharing:
        return "none"
    alone = len(plan.groups) - plan.sharing
    groups = len(set(plan.groups)) - alone
    keys = "1 key" if groups == 1 else f"{groups} keys"
    setting = plan.job.targets.shared_keys
    return f"{plan.sharing} requests share {keys} (targets.shared_keys: {setting})"


def _sizes(sizes: list[int]) -> str:
    if any(size != sizes[0] for size in sizes[:-1]):
        return f"{len(sizes)} of {min(sizes)} to {max(sizes)}"
    last = "" if sizes[-1] == sizes[0] else f", the last of {sizes[-1]}"
    return f"{len(sizes)} of {sizes[0]}{last}"
