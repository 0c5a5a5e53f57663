"""``pmet tune``: finds hyper-parameters for a model by trial edits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs.arguments import JobSettings, RayAddress

if TYPE_CHECKING:
    from pipeline.job import JobConfig

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_UNITS = {"s": 1, "m": 60, "h": 3600}


def tune(
    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB.yaml|MODEL",
            help="Job that hyper-parameters are sought for: its model, facts, corpus and workers. "
            "The search starts from its hparams. Or a model, with facts beside it.",
        ),
    ],
    facts: Annotated[
        str | None,
        typer.Argument(
            metavar="[FACTS]",
            help="Requests, if a model is given: a file, folder or pattern. --set gives the other "
            "keys of the job, e.g. corpus=texts.parquet.",
        ),
    ] = None,
    *,
    output: Annotated[
        str, typer.Option(help="Folder for the search, empty or new: a path or a URL.")
    ],
    budget: Annotated[
        str, typer.Option(help="Time for the search, such as 90s, 20m or 2h.")
    ] = "20m",
    trial_facts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Facts to try settings on. Default: as many as there is time for, at most half of "
            "them and 200.",
        ),
    ] = None,
    judged_facts: Annotated[
        int | None,
        typer.Option(min=1, help="Other facts to judge the result on. Default: the same."),
    ] = None,
    most_perplexity: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Rise of perplexity that costs nothing, as a fraction; beyond, a point per cent.",
        ),
    ] = 0.05,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Count answers in chat as well, and try contexts in chat."),
    ] = False,
    settings: JobSettings = None,
    address: RayAddress = None,
) -> None:
    """Find hyper-parameters for a model and its facts, by trial edits."""
    from jobs.tune.tuning import Settings
    from jobs.tune.tuning import tune as search
    from jobs.tune.views import show_tuned
    from pipeline.hyper_parameters import TUNED
    from pipeline.progress import RichProgress

    seconds = _seconds(budget)
    config = _job(job, facts, settings or [])
    wanted = Settings(output, seconds, trial_facts, judged_facts, most_perplexity, address, chat)
    tuned = search(config, wanted, progress=RichProgress(err))
    show_tuned(tuned.record, tuned.store.join(TUNED), out)


def _job(job: str, facts: str | None, settings: Sequence[str]) -> JobConfig:
    from pipeline.job import load_job

    if facts is None:
        return load_job(job, settings)
    # As for the others: what --set says comes last, and wins.
    values = {"model": job, "requests": facts, "output": "unused"}
    given = [f"{key}={json.dumps(text)}" for key, text in values.items()]
    return load_job(None, [*given, *settings])


def _seconds(text: str) -> float:
    if not (match := re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", text)) or not float(match[1]):
        raise typer.BadParameter(
            f"{text!r} is not a time above 0; give one such as 90s, 20m or 2h",
            param_hint="--budget",
        )
    return float(match[1]) * _UNITS[match[2]]
