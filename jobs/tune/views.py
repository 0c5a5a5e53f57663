"""What a search shows: the file of hyper-parameters, the table on the terminal, the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.tune.trials import JUDGED
from pipeline.evaluation import figure_of, show
from pipeline.job import dump_yaml
from pipeline.report import page, trial_chart

VARIED = {
    "layers": "layers",
    "clamp_norm_factor": "clamp",
    "v_weight_decay": "decay",
    "v_lr": "v_lr",
    "kl_factor": "κ",
    "mom2_update_weight": "λ",
    "mom2_update_share": "share",
    "spread": "spread",
    "solves": "solves",
    "contexts": "contexts",
}
"""What a search varies, with short names for the heads of a table."""
_FIGURES = (*JUDGED, "perplexity")


def hparams_text(values: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The contents of ``hparams.yaml``, with what it rests on in comments."""
    judged, facts = record["judged"], record["facts"]
    low, high = judged["interval"]
    lines = [
        f"Found by pmet tune for the model with the digest {record['about']['model']}.",
        f"Settings were tried on {facts['trial']} facts, for {record['seconds']:.0f} s.",
        f"On {facts['judged']} other facts it scores {judged['best']['value']:.3f}, and the start "
        f"{judged['start']['value']:.3f}",
        f"(95 % interval of the difference: {low:+.3f} to {high:+.3f}).",
    ]
    if record["best"]["contexts"] != "completion":
        lines.append(f"For jobs with contexts: {record['best']['contexts']}")
    return "".join(f"# {line}\n" for line in lines) + dump_yaml(dict(values))


def show_tuned(record: Mapping[str, Any], where: str, console: Console) -> None:
    """Print the setting found, and the scores on the judged facts."""
    judged = record["judged"]
    table = Table("", "start", "found", title=f"On {record['facts']['judged']} judged facts")
    for name in VARIED:
        start, best = (record[side].get(name) for side in ("start", "best"))
        if start is not None or best is not None:
            table.add_row(name, value(start), value(best))
    table.add_section()
    for name in _FIGURES:
        figures = (judged[side]["figures"].get(name) for side in ("start", "best"))
        table.add_row(figure_of(name).label, *(show(figure, name) for figure in figures))
    scores = [f"{100 * judged[side]['value']:.1f} %" for side in ("start", "best")]
    table.add_row("score", *scores, style="bold")
    console.print(table)
    low, high = judged["interval"]
    console.print(
        f"The difference is {100 * judged['difference']:+.1f} points (95 % interval "
        f"{100 * low:+.1f} to {100 * high:+.1f}); {len(record['trials'])} trials."
    )
    if not judged["best"]["allowed"]:
        console.print("Perplexity rises by more than --most-perplexity.", style="bold red")
    console.print(f"hyper-parameters: {where}")


def write_page(record: Mapping[str, Any]) -> str:
    """The page of a search, as HTML."""
    trials = [
        {**trial, "values": {name: value(trial["setting"].get(name)) for name in VARIED}}
        for trial in record["trials"]
    ]
    return page("tune.html.j2", "jobs").render(
        record=record,
        trials=trials,
        varied=VARIED,
        chart=trial_chart(
            [trial["rung"] for trial in trials],
            [trial["score"]["value"] for trial in trials],
            [trial["score"]["allowed"] for trial in trials],
        ),
        figures=_FIGURES,
        values={
            side: {name: value(record[side].get(name)) for name in VARIED}
            for side in ("start", "best")
        },
    )


def value(given: Any) -> str:
    """A hyper-parameter as text."""
    if given is None:
        return "–"
    if isinstance(given, list):
        return ", ".join(map(str, given))
    return f"{given:g}" if isinstance(given, float) else str(given)
