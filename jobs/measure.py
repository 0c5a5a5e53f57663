"""``pmet evaluate``: a model's figures on edit requests, in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jobs.views import percent
from pipeline.checkpoint import Checkpoint, open_model_folder
from pipeline.model_cache import default_cache
from pipeline.progress import RichProgress
from pipeline.replica import ModelSource
from pipeline.schema import read_requests
from pmet.errors import RequestError
from pmet.metrics import evaluate


def evaluate_model(
    model: str,
    requests: Sequence[str],
    *,
    sample: int | None,
    seed: int,
    output: Path | None,
    console: Console,
) -> None:
    """Measure a model on edit requests and print its figures.

    Raises:
        InputError: the model or the requests cannot be read, or no row is usable.
    """
    folder = Checkpoint.open(open_model_folder(model, default_cache())).folder
    table = read_requests(requests)
    if not table.requests:
        raise RequestError(f"none of {len(table.table)} rows can be measured: they are all faulty")
    chosen = table.requests
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    with RichProgress().stage("measure") as bar:
        opened, tokenizer = ModelSource(str(folder), torch.cuda.is_available()).open()
        figures: dict[str, Any] = evaluate(opened, tokenizer, chosen, on_progress=bar.advance)
    figures.pop("rows")
    shown = Table("", "probability", "strict")
    for name in ("efficacy", "generalization", "specificity"):
        shown.add_row(name, percent(figures[name]), percent(figures[f"{name}_strict"]))
    shown.add_row("score", percent(figures["score"]), "")
    console.print(f"{len(chosen)} requests, {len(table.rejected)} faulty rows left out")
    console.print(shown)
    if output is not None:
        figures["counts"] = {"measured": len(chosen), "rejected": len(table.rejected)}
        output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
