"""A nightly refresh on Airflow 3, and a push of the model that it promoted.

Put this file into the DAG folder. `pmet` must be on the PATH of the workers, and HF_TOKEN in their
environment. What a gate held back and what is wrong with the input fail at once and call
`tell_people`; everything else is retried, and each try resumes the one before.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from datetime import datetime, timedelta
from typing import Any

import fsspec
from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

REFRESH = os.environ.get("PMET_REFRESH", "/etc/pmet/refresh.yaml")
HOME = os.environ.get("PMET_HOME", "s3://models/gpt-j-6b-current")
HUB = os.environ.get("PMET_HUB", "hf://acme/facts-6b")

# No retry changes these.
FINAL = {
    2: "bad input: the log says what to change in the refresh file, the dump or the templates",
    3: "a gate held the new version back: see its report; the version in use stays in use",
}


def pmet(*arguments: str) -> str:
    """Run a pmet command and return what it printed; progress and errors go to the task's log.

    Raises:
        AirflowFailException: a retry would end in the same way.
        RuntimeError: a retry may succeed.
    """
    ended = subprocess.run(["pmet", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode in FINAL:
        raise AirflowFailException(f"pmet {arguments[0]}: {FINAL[ended.returncode]}")
    if ended.returncode:
        raise RuntimeError(f"pmet {arguments[0]} ended with {ended.returncode}; a retry resumes it")
    return ended.stdout


def version_in_use() -> dict[str, Any]:
    """Where the model in use is, and what its run recorded."""
    model = pmet("versions", HOME, "--current").strip()
    with fsspec.open(f"{model.rpartition('/')[0]}/run.json", "rt") as file:
        run = json.load(file)
    return {"model": model, "digest": run["digest"], "counts": run["counts"]}


def tell_people(context: dict[str, Any]) -> None:
    """Replace this by a message to those who look after the model."""
    logging.getLogger(__name__).error("tell people: %s", context["exception"])


@dag(
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1),
    # A missed night needs no run of its own: the next dump has its facts.
    catchup=False,
    max_active_runs=1,
    default_args={"on_failure_callback": tell_people},
)
def pmet_nightly() -> None:
    """Refresh the model, then push the version in use."""

    @task(retries=3, retry_delay=timedelta(minutes=5), retry_exponential_backoff=True)
    def refresh(ds: str | None = None) -> dict[str, Any]:
        # Without a logical date, as for a run started by hand, the dump of today is read.
        pmet("refresh", REFRESH, *(("--date", ds) if ds else ()))
        return version_in_use()

    @task(retries=5, retry_delay=timedelta(minutes=5), retry_exponential_backoff=True)
    def push(version: dict[str, Any]) -> str:
        return pmet("push", version["model"].rpartition("/model")[0], HUB)

    push(refresh())


pmet_nightly()
