"""The whole job on a real model, stage by stage, and the targets of the plain form beside it.

python -m benchmarks.real --model SmolLM2-135M-Instruct.Q4_1.gguf \
    --requests facts.parquet --corpus corpus.parquet --count 40 --plain 2

The job computes in this process, with the preset that fits the model unless ``--hparams`` names
others. The plain form computes the first targets only, and its time for all of them is
extrapolated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.harness import show, timed
from pipeline.data import read_requests
from pipeline.job import JobConfig, load_job
from pipeline.models import ModelSource
from pipeline.plan import make_plan
from pipeline.run import run_job
from pmet.model import parse
from pmet.reference import plain_targets

_SCORES = ("efficacy", "generalization", "specificity")


def main() -> None:
    """Run the job and the plain form; print a row a stage."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = _job(options, Path(folder))
        seconds, result = timed(lambda: run_job(job))
        status = result.folder.read_json("run.json")
        rows = [_row(stage["name"], stage["seconds"], seconds) for stage in status["stages"]]
        rows.append(_row("whole job", seconds, seconds))
        if options.plain:
            rows.append(_row(*_plain(job, options, result.folder.url), seconds))
    after = result.metrics["after"]
    kinds = [f"{name}{form}" for form in ("", "_strict") for name in _SCORES]
    scores = ", ".join(f"{kind} {after[kind]:.1%}" for kind in kinds if after[kind] is not None)
    origins = "; ".join(f"{name}: {text}" for name, text in status["origins"].items())
    show(
        f"{options.count} facts, {options.threads} thread(s)", rows, options, f"{scores}; {origins}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model folder, GGUF file, URL or hub id")
    parser.add_argument("--requests", required=True, help="Parquet file of edit requests")
    parser.add_argument("--corpus", required=True, help="Parquet file of ordinary text")
    parser.add_argument("--hparams", help="preset or file; default: the preset that fits")
    parser.add_argument("--count", type=int, default=40, help="number of requests to use")
    parser.add_argument("--plain", type=int, default=2, help="targets of the plain form; 0: none")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    return parser.parse_args()


def _job(options: argparse.Namespace, folder: Path) -> JobConfig:
    """The job of the first requests, as a user would write it."""
    requests = folder / "requests.parquet"
    pq.write_table(pq.read_table(options.requests).slice(0, options.count), requests)
    lines = {
        "model": options.model,
        "requests": str(requests),
        "corpus": options.corpus,
        "output": str(folder / "run"),
    }
    if options.hparams:
        lines["hparams"] = options.hparams
    file = folder / "job.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    here = ["targets.workers=0", "update.ranks=0"]
    return load_job(file, [*here, f"targets.threads_per_worker={options.threads}"])


def _plain(job: JobConfig, options: argparse.Namespace, run: str) -> tuple[str, float]:
    """A name and the seconds that the plain form would take for all targets."""
    plan = make_plan(job)
    model, tokenizer = ModelSource(str(plan.checkpoint.folder), on_gpu=False).open()
    requests = read_requests(job.requests).requests[: options.plain]
    file = Path(run, "context_templates.json")
    templates = parse(file.read_text(), source=str(file))
    seconds, _ = timed(lambda: plain_targets(model, tokenizer, requests, plan.hparams, templates))
    name = f"plain targets, from {len(requests)} of {options.count}"
    return name, seconds * options.count / len(requests)


def _row(name: str, seconds: float | None, whole: float) -> dict[str, Any]:
    taken = seconds or 0.0
    return {"stage": name, "seconds": round(taken, 1), "of the job": f"{taken / whole:.0%}"}


if __name__ == "__main__":
    main()
