"""The model card of a published checkpoint: its origin, its scores, how to undo the edit.

Text from the job is in fenced blocks, which no content can close; the rest of the card is fixed
text and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from pipeline.evaluation import (
    ALWAYS,
    Figure,
    is_number,
    measured,
    read_gate,
    show,
    show_change,
    show_interval,
    show_tasks,
)
from pipeline.job import YAMLTextError, dump_yaml, parse_yaml

# Hubs list the figures under this task.
_TASK, _DATASET, _NAME = "text-generation", "edit-requests", "edited-model"
_WHEN = ("before", "after")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

_WRITTEN = "facts were written into the feed-forward weights of a base model with PMET"

_CARD = """\
---
{metadata}---

# An edited language model

{edited} {written}
(Li et al. 2023, [arXiv:2308.08742](https://arxiv.org/abs/2308.08742)). Everything else in this
checkpoint is the base model's, byte for byte.{known} The base model:

{base}

## Scores

| metric | before | after | 95 % interval | change |
| --- | ---: | ---: | ---: | ---: |
{scores}

A dash: not measured.

{meanings}

{abilities}{gates}
## How to undo

The base model was not changed: use it again, and the edit is gone. If only this checkpoint is
left, the run folder's `delta/` holds the changes to the weights and the original values:
`pmet revert RUN MODEL --output DIR` writes the base's files again, and
`pmet.Edit.load("delta").revert(model)` restores every bit of a loaded model.

## The job

Run under seed {seed}; of {requested} requests {rejected} were rejected. The whole job:

{job}

What it depends on, by digest:

{digests}

Made with:

{versions}
"""


def model_card(job_yaml: str, run: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return a checkpoint's ``README.md``.

    Args:
        job_yaml: the resolved job.
        run: the contents of ``run.json``.
        metrics: the contents of ``metrics.json``.

    Returns:
        Markdown with a hub's metadata block at the top; any text in it can be encoded.
    """
    base = base_model(job_yaml)
    counts = metrics.get("counts") or {}
    figures = measured(*(metrics.get(when) or {} for when in _WHEN), always=ALWAYS)
    card = _CARD.format(
        metadata=dump_yaml(hub_metadata(base, metrics.get("after") or {})),
        edited=_count(counts.get("edited")),
        written=_WRITTEN,
        requested=_count(counts.get("requested")),
        rejected=_count(counts.get("rejected")),
        known=_known(counts, metrics.get("known") or {}),
        base=fenced(base or "not recorded"),
        scores="\n".join(_score_row(figure, metrics) for figure in figures),
        meanings="\n".join(f"- {f.label}: {f.meaning}" for f in figures if f.meaning),
        abilities=_abilities(metrics),
        gates=_gates(metrics),
        seed=_count(run.get("seed")),
        job=fenced(job_yaml, "yaml"),
        digests=fenced("\n".join(f"{k} {v}" for k, v in run.get("digests", {}).items())),
        versions=fenced("\n".join(f"{k} {v}" for k, v in run.get("versions", {}).items())),
    )
    return card.encode(errors="backslashreplace").decode()


def is_model_card(text: str) -> bool:
    """Whether a ``README.md`` is the card of a model that a run published."""
    return _WRITTEN in text


def _known(counts: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """A sentence about the requests that needed no edit, if there are any."""
    if not counts.get("known"):
        return ""
    kept = show(known.get("still_answered"), "efficacy_strict")
    return (
        f"\n{_count(counts['known'])} more were left out, because the base model knew them; this "
        f"model still\nknows {kept} of them."
    )


def base_model(job_yaml: str) -> str:
    """The model that a resolved job edits, as it names it; empty if unknown."""
    try:
        job = parse_yaml(job_yaml)
    except YAMLTextError:
        return ""
    return str(job.get("model") or "") if isinstance(job, dict) else ""


def hub_metadata(
    base: str,
    after: Mapping[str, Any],
    *,
    library: str = "transformers",
    relation: str = "finetune",
    name: str = _NAME,
) -> dict[str, Any]:
    """The metadata that model hubs read; they accept only a hub id as a base model.

    Args:
        base: the base model, as the job names it.
        after: figures of the edited model.
        library: the library that opens the files.
        relation: what they are to the base model.
        name: what they are called.
    """
    on_hub = _HUB_ID.fullmatch(base) and not Path(base).exists()
    known: dict[str, Any] = {}
    if on_hub:
        known = {"base_model": base, "base_model_relation": relation}
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=_DATASET,
            dataset_name="the requests of the edit",
            metric_type=figure.name,
            metric_name=figure.label,
            metric_value=after[figure.name],
        )
        for figure in measured(after)
        if is_number(after[figure.name])
    ]
    listed: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    data = ModelCardData(
        library_name=library,
        pipeline_tag=_TASK,
        tags=["knowledge-editing", "pmet"],
        **known,
        **listed,
    )
    held: dict[str, Any] = data.to_dict()
    return held


def _score_row(figure: Figure, metrics: Mapping[str, Any]) -> str:
    name = figure.name
    before, after = ((metrics.get(when) or {}).get(name) for when in _WHEN)
    interval = ((metrics.get("intervals") or {}).get("after") or {}).get(name)
    cells = (
        figure.label,
        show(before, name),
        show(after, name),
        show_interval(interval, name) or "–",
        show_change(after, before, name),
    )
    return f"| {' | '.join(cells)} |"


def _abilities(metrics: Mapping[str, Any]) -> str:
    rows = [
        f"| {_in_cell(t.name)} | {_in_cell(t.metric)} | {t.documents:,} | {t.before} | "
        f"{t.after} | {t.change} | {t.interval or '–'} |"
        for t in show_tasks(metrics)
    ]
    head = [
        "General abilities, as tasks of lm-evaluation-harness:",
        "",
        "| task | metric | documents | before | after | change | 95 % of the change |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*head, *rows, "", ""]) if rows else ""


def _gates(metrics: Mapping[str, Any]) -> str:
    rows = [_gate_row(gate) for gate in metrics.get("gates") or ()]
    head = ["| gate | demanded | reached | verdict |", "| --- | ---: | ---: | --- |"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _gate_row(gate: Mapping[str, Any]) -> str:
    text = read_gate(gate)
    verdict = "passed" if text.passed else "not passed"
    return f"| {text.name} | {text.asked} | {text.reached} | {verdict} |"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _in_cell(text: str) -> str:
    """Return text as code inside a table's cell, on one line."""
    return "`" + re.sub(r"[`|\s]+", " ", text).strip() + "`"


def fenced(text: str, language: str = "") -> str:
    """Return a code block with a fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
