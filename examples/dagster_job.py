"""An edit job as a Dagster asset: one run for each day's facts, with its figures as metadata.

`dagster dev -f dagster_job.py` serves it. `pmet` must be on the PATH. What a gate held back and
what is wrong with the input fail at once; everything else is retried, and each try resumes the one
before.
"""

import json
import os
import subprocess
from typing import Any

import dagster as dg
import fsspec

JOB = os.environ.get("PMET_JOB", "/etc/pmet/job.yaml")
FACTS = os.environ.get("PMET_FACTS", "s3://facts")
RUNS = os.environ.get("PMET_RUNS", "s3://runs")

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01")
# No retry changes these.
FINAL = {
    2: "bad input: the log says what to change in the job or the facts",
    3: "a gate held the model back: see report.html in the run folder",
}


def run_of(folder: str) -> dict[str, Any]:
    """What a run recorded in its folder; empty if it did not come to that."""
    try:
        with fsspec.open(f"{folder}/run.json", "rt") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}


def edited(day: str) -> dict[str, Any]:
    """Edit the model with a day's facts and return what the run recorded.

    Raises:
        Failure: a retry would end in the same way.
        RetryRequested: a retry may succeed.
    """
    folder = f"{RUNS}/{day}"
    settings = (f"output={folder}", f"requests={FACTS}/{day}/*.parquet")
    arguments = [word for setting in settings for word in ("--set", setting)]
    status = subprocess.run(["pmet", "run", JOB, "--log-lines", *arguments], check=False).returncode
    run = run_of(folder)
    if status in FINAL:
        metadata = {"run": folder, "error": str(run.get("error") or FINAL[status])}
        raise dg.Failure(f"pmet: {FINAL[status]}", metadata=metadata, allow_retries=False)
    if status:
        raise dg.RetryRequested(max_retries=3, seconds_to_wait=300)
    return run


@dg.asset(partitions_def=DAYS)
def edited_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """A model that knows the facts of a day."""
    run = edited(context.partition_key)
    counts = {name: dg.MetadataValue.int(count) for name, count in run["counts"].items()}
    return dg.MaterializeResult(metadata={"digest": run["digest"], **counts})


defs = dg.Definitions(
    assets=[edited_model],
    schedules=[
        dg.build_schedule_from_partitioned_job(
            dg.define_asset_job("pmet_nightly", [edited_model]), hour_of_day=2, minute_of_hour=30
        )
    ],
)
