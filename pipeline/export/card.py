"""The card of an export: what it is of, its scores, and how to use it.

Text from the job is in fenced blocks, which no content can close; the rest of the card is fixed
text and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation import ALWAYS, measured, show, show_change, show_interval
from pipeline.job import dump_yaml
from pipeline.models import is_gguf
from pipeline.report import fenced, hub_metadata

_CARD = """\
---
{metadata}---

# An edit of a language model, {title}

{facts} facts, edited in the feed-forward weights of a base model with PMET (Li et al. 2023,
[arXiv:2308.08742](https://arxiv.org/abs/2308.08742)). The base model, and the SHA-256 that its
files had together:

{base}
{gguf}
{held}## Use

{use}

## Weights

{weights}

## Scores

{scores}

Made from the run `{digest}` with:

{versions}
"""
_HELD = "**A gate held the edited model back.** Its scores did not reach what the job demanded.\n\n"
_GGUF = """
It is a GGUF file. What was edited is the checkpoint dequantised from it, which
`pmet revert RUN RUN/model --output BASE` writes; use that as the base model.
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")
model = PeftModel.from_pretrained(base, ".")  # this folder"""
_DELTA = """\
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")
weights = dict(model.named_parameters())
for file in sorted(Path(".").glob("*.safetensors")):  # this folder
    saved = load_file(file)
    for key in saved:
        kind, _, name = key.partition(".")
        if kind == "delta":
            original = saved[f"original.{{name}}"].to(weights[name].dtype)
            assert torch.equal(weights[name], original), "another base model"
            weights[name].data = (original.double() + saved[key]).to(original.dtype)"""


def adapter_card(record: Mapping[str, Any]) -> str:
    """The card of an adapter.

    Args:
        record: the contents of ``export.json``.
    """
    base = record["base"]["model"]
    use = (
        f"{fenced(_ADAPTER.format(base=base), 'python')}\n\n"
        f"Servers read the same folder; the rank is {record['rank']}. The factors are float32: "
        "rounded to bfloat16,\nas some servers do, they lose 0.2 % of Δ."
    )
    rows = [
        f"| `{weight['parameter']}` | {weight['rank']} | {weight['full_rank']} | "
        f"{100 * weight['energy']:.4g} % | {weight['error']:.1e} | {weight['largest_error']:.1e} |"
        for weight in record["weights"]
    ]
    head = [
        "| weight | rank | rank of Δ | energy | ‖B·A − Δ‖/‖Δ‖ | max\\|B·A − Δ\\|/max\\|Δ\\| |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    after = record["scores"]["adapter"] or (record["scores"]["run"] if record["exact"] else {})
    metadata = hub_metadata(base, after, library="peft", relation="adapter", name="edit-adapter")
    weights = "\n".join([*head, *rows])
    return _card(record, metadata, "as a LoRA adapter", use, weights, _adapter_scores(record))


def delta_card(record: Mapping[str, Any]) -> str:
    """The card of deltas.

    Args:
        record: the contents of ``export.json``.
    """
    base, run = record["base"]["model"], record["scores"]["run"]
    use = (
        "`pmet apply . MODEL --output DIR` writes the edited model, and `pmet revert` takes the "
        "edit off again.\nWithout pmet, in a loaded model:\n\n"
        f"{fenced(_DELTA.format(base=base), 'python')}"
    )
    listed = "\n".join(f"- `{weight['parameter']}`" for weight in record["weights"])
    weights = (
        "Each file holds the change of a weight, `delta.NAME` in float64, and the values that it "
        f"was made for,\n`original.NAME`; NAME is that of the loaded model.\n\n{listed}"
    )
    metadata = hub_metadata(base, run, library="safetensors", name="edit-delta")
    scores = f"Of the run's model, which applying the deltas gives again:\n\n{_table(record)}"
    return _card(record, metadata, "as deltas of its weights", use, weights, scores)


def _card(
    record: Mapping[str, Any],
    metadata: Mapping[str, Any],
    title: str,
    use: str,
    weights: str,
    scores: str,
) -> str:
    card = _CARD.format(
        metadata=dump_yaml(metadata),
        title=title,
        facts=f"{record['facts']:,}",
        base=fenced(f"{record['base']['model'] or 'not recorded'}\n{record['base']['digest']}"),
        gguf=_GGUF if is_gguf(record["base"]["model"]) else "",
        held=_HELD if record["status"] == "held" else "",
        use=use,
        weights=weights,
        scores=scores,
        digest=record["digest"],
        versions=fenced("\n".join(f"{k} {v}" for k, v in record["versions"].items())),
    )
    return card.encode(errors="backslashreplace").decode()


def _adapter_scores(record: Mapping[str, Any]) -> str:
    if record["exact"]:
        text = (
            "B·A equals Δ but for the rounding of float32, which was checked: the scores are those "
            "of the run's model."
        )
    elif record["scores"]["adapter"] is None:
        text = (
            "**Not measured.** The adapter has only a part of the edit. These are the scores of "
            "the run's model, which has all of it:"
        )
    else:
        text = (
            f"The adapter has only a part of the edit. Its scores were measured on it (on "
            f"{record['measured_on']}), as the run\nmeasured its own model:"
        )
    return f"{text}\n\n{_table(record)}"


def _table(record: Mapping[str, Any]) -> str:
    scores, intervals = record["scores"], record["intervals"]
    names = ["before", "run", *(["adapter"] if scores.get("adapter") else [])]
    figures = measured(*(scores[name] for name in names), always=ALWAYS)
    titles = [*names, "95 % interval", f"{names[-1]} − {names[-2]}"]
    lines = [f"| figure | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for figure in figures:
        values = [scores[name].get(figure.name) for name in names]
        interval = intervals[names[-1]].get(figure.name)
        cells = [
            figure.label,
            *(show(value, figure.name) for value in values),
            show_interval(interval, figure.name) or "–",
            show_change(values[-1], values[-2], figure.name),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    meanings = "\n".join(f"- {figure.label}: {figure.meaning}" for figure in figures)
    return "\n".join([*lines, "", "A dash: not measured.", "", meanings])
