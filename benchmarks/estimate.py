"""A dry run's estimate compared with the run's actual time, on the demo and on CounterFact facts.

python -m benchmarks.estimate [--counterfact FOLDER] [--count 600]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.job import JobConfig


def main() -> None:
    """Estimate, run, compare."""
    # Not at the top: the measured processes would import all of it, which workers do not.
    from benchmarks.harness import show

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counterfact", type=Path, help="folder of a model, its facts and corpus")
    parser.add_argument("--count", type=int, default=600, help="CounterFact facts")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = []
        for name, job in jobs(options, Path(folder)):
            rows += compared(name, job)
        show("estimated and measured, in seconds", rows, options)


def jobs(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, JobConfig]]:
    """Yield the demo's job, and one on CounterFact if its folder is given."""
    import pyarrow.parquet as pq

    from jobs.demo.show import demo_job
    from pipeline.job import JobConfig

    yield "demo", demo_job(folder / "demo")
    given = options.counterfact
    if given:
        facts = folder / "facts.parquet"
        pq.write_table(pq.read_table(given / "facts.parquet").slice(0, options.count), facts)
        yield (
            "CounterFact",
            JobConfig(
                model=str(given / "model"),
                requests=(str(facts),),
                output=str(folder / "counterfact"),
                hparams=str(given / "hparams.json"),
                corpus=(str(given / "corpus.parquet"),),
                context_templates=str(given / "context_templates.json"),
            ),
        )


def compared(name: str, job: JobConfig) -> list[dict[str, Any]]:
    """Return the estimated and the measured time of each stage and of the whole run."""
    from pipeline.estimate import estimate
    from pipeline.job import dump_job
    from pipeline.plan import make_plan

    found = estimate(make_plan(job))
    file = Path(f"{job.output}.yaml")
    file.write_text(dump_job(job))
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jobs", "run", str(file)], check=True, capture_output=True
    )
    seconds = time.perf_counter() - start
    run = json.loads((Path(job.output) / "run.json").read_text())
    took = {stage["name"]: stage["seconds"] for stage in run["stages"]}
    rows = [
        {"job": name, "stage": stage, "estimated": estimated, "measured": took.get(stage, "")}
        for stage, estimated in found.stages.items()
    ]
    whole = {"job": name, "stage": "total", "estimated": found.seconds, "measured": seconds}
    ratio = {"job": name, "stage": "ratio", "estimated": found.seconds / seconds, "measured": 1.0}
    return [*rows, whole, ratio]


if __name__ == "__main__":
    main()
