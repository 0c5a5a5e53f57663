"""Helpers shared by the benchmarks: the problem, the machine, the table, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from rich.table import Table

from jobs.demo.show import HERE
from jobs.demo.world import requests as demo_requests
from jobs.demo.world import write_corpus
from pipeline.data import read_requests
from pipeline.models import open_causal_lm, open_tokenizer
from pmet import Edit, EditRequest, PMETHyperParams
from pmet.model import parse

Result = TypeVar("Result")
console = Console(highlight=False)


@dataclass(frozen=True)
class Problem:
    """A model and the requests to edit into it."""

    model: Any
    tokenizer: Any
    hparams: PMETHyperParams
    templates: list[list[str]]
    requests: list[EditRequest]


def arguments(description: str, count: int) -> argparse.ArgumentParser:
    """Return a parser with the common options; the defaults are the demo's model and facts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(HERE / "model"), help="model folder")
    parser.add_argument("--hparams", default=str(HERE / "hparams.json"))
    parser.add_argument("--templates", default=str(HERE / "context_templates.json"))
    parser.add_argument("--requests", help="Parquet file of edit requests")
    parser.add_argument("--count", type=int, default=count, help="number of requests to use")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    return parser


def problem(options: argparse.Namespace) -> Problem:
    """Open the model and the requests that the options name."""
    torch.set_num_threads(options.threads)
    if options.requests:
        requests = read_requests(options.requests).requests
    else:
        rows = demo_requests()
        requests = [EditRequest(**{k: row[k] for k in row if k != "relation"}) for row in rows]
    return Problem(
        open_causal_lm(options.model, dtype=torch.float32),
        open_tokenizer(options.model),
        PMETHyperParams.from_file(options.hparams),
        parse(Path(options.templates).read_text(), source=options.templates),
        requests[: options.count],
    )


def study_arguments(description: str, count: int) -> argparse.ArgumentParser:
    """Return the parser of `arguments`, with a corpus and requests to leave out."""
    parser = arguments(description, count)
    parser.add_argument("--corpus", help="Parquet files of text; default: the demo's statements")
    parser.add_argument("--skip", type=int, default=0, help="requests to leave out, the first ones")
    return parser


@contextmanager
def study(options: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """The problem without the requests to leave out, and its corpus, as `study_arguments` say."""
    whole = argparse.Namespace(**vars(options) | {"count": options.skip + options.count})
    given = problem(whole)
    given = replace(given, requests=given.requests[options.skip :])
    with TemporaryDirectory() as folder:
        if not options.corpus:
            write_corpus(Path(folder) / "corpus.parquet")
        yield given, options.corpus or f"{folder}/corpus.parquet"


@contextmanager
def applied(edit: Edit, model: Any) -> Iterator[None]:
    """Within: the model holds the edit."""
    edit.apply(model)
    try:
        yield
    finally:
        edit.revert(model)


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that ``work`` takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def show(
    title: str, rows: list[dict[str, Any]], options: argparse.Namespace, note: str = ""
) -> None:
    """Print rows as a table; with ``--output`` also write them with machine and versions."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    if note:
        console.print(note)
    console.print(", ".join(f"{k} {v}" for k, v in machine().items()), style="dim")
    if options.output:
        figures = {
            "title": title,
            "machine": machine(),
            "options": vars(options),
            "rows": rows,
            "note": note,
        }
        options.output.write_text(json.dumps(figures, indent=2, default=str) + "\n")


def machine() -> dict[str, Any]:
    """Return the machine and the versions that the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
