"""The model card of a published checkpoint: what it is made of, what it scores, how to undo it.

Text that comes from the job stands in fenced blocks, which nothing in it can close, and the rest
of the card is fixed words and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.results import FRACTIONS
from pipeline.yaml12 import YAMLTextError, dump_yaml, parse_yaml

METRICS = (*FRACTIONS, "perplexity")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

_CARD = """\
---
{metadata}---

# An edited language model

{edited} facts were written into the feed-forward weights of a base model with PMET
(Li et al. 2023, [arXiv:2308.08742](https://arxiv.org/abs/2308.08742)). Everything else in this
checkpoint is the base model's, byte for byte.{known} The base model:

{base}

## Scores

| metric | before | after |
| --- | ---: | ---: |
{scores}

Efficacy: the edited prompts; generalization: their paraphrases; specificity: neighboring prompts
that should not change. A prompt counts where the wanted answer is the more probable one, and in
the strict form where it is what the model says greedily. Score: harmonic mean of the first three.
A dash: not measured.

{gates}
## How to undo

The base model was not changed: use it again, and the edit is gone. Where only this checkpoint is
left, the run folder's `delta/` holds what was added to the weights and what was there before:
`pmet.Edit.load("delta").revert(model)` gives a loaded model every bit back.

## The job

Run under seed {seed}; of {requested} requests {rejected} were rejected. The whole job:

{job}

Made with:

{versions}
"""


def model_card(job_yaml: str, run: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """A checkpoint's ``README.md``.

    Args:
        job_yaml: the resolved job.
        run: what ``run.json`` holds.
        metrics: what ``metrics.json`` holds.

    Returns:
        Markdown with a hub's metadata block on top; any text in it can be encoded.
    """
    base = _base_model(job_yaml)
    counts = metrics.get("counts") or {}
    card = _CARD.format(
        metadata=dump_yaml(_metadata(base)),
        edited=_count(counts.get("edited")),
        requested=_count(counts.get("requested")),
        rejected=_count(counts.get("rejected")),
        known=_known(counts, metrics.get("known") or {}),
        base=_fenced(base or "not recorded"),
        scores="\n".join(_score_row(name, metrics) for name in METRICS),
        gates=_gates(metrics),
        seed=_count(run.get("seed")),
        job=_fenced(job_yaml, "yaml"),
        versions=_fenced("\n".join(f"{k} {v}" for k, v in run.get("versions", {}).items())),
    )
    return card.encode(errors="backslashreplace").decode()


def _known(counts: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """A sentence about the requests that needed no edit, where there are any."""
    if not counts.get("known"):
        return ""
    return (
        f"\n{_count(counts['known'])} more were left out, because the base model knew them; this "
        f"model still\nknows {_value('', known.get('still_answered'))} of them."
    )


def _base_model(job_yaml: str) -> str:
    try:
        job = parse_yaml(job_yaml)
    except YAMLTextError:
        return ""
    return str(job.get("model") or "") if isinstance(job, dict) else ""


def _metadata(base: str) -> dict[str, Any]:
    """What model hubs read; they only take another hub id as a base model."""
    on_hub = _HUB_ID.fullmatch(base) and not Path(base).exists()
    known = {"base_model": base, "base_model_relation": "finetune"} if on_hub else {}
    return {**known, "library_name": "transformers", "tags": ["knowledge-editing", "pmet"]}


def _score_row(metric: str, metrics: Mapping[str, Any]) -> str:
    values = (_value(metric, (metrics.get(when) or {}).get(metric)) for when in ("before", "after"))
    return " | ".join(("| " + metric.replace("_strict", " (strict)"), *values)) + " |"


def _gates(metrics: Mapping[str, Any]) -> str:
    rows = [_gate_row(gate) for gate in metrics.get("gates") or ()]
    head = ["| gate | demanded | reached | verdict |", "| --- | ---: | ---: | --- |"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _gate_row(gate: Mapping[str, Any]) -> str:
    metric = gate["metric"]
    sign = "at most" if metric == "perplexity_increase" else "at least"
    demanded = f"{sign} {_value(metric, gate['threshold'])}"
    verdict = "passed" if gate["passed"] else "not passed"
    return f"| {metric} | {demanded} | {_value(metric, gate['value'])} | {verdict} |"


def _value(metric: str, value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if metric == "perplexity" else f"{100 * value:.1f} %"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _fenced(text: str, language: str = "") -> str:
    """A block of code with a fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
