"""A nightly refresh as a Prefect 3 flow, and a push of the model that it promoted.

`python prefect_flow.py` serves it, every night at half past two. `pmet` must be on the PATH and
HF_TOKEN in the environment. What a gate held back and what is wrong with the input fail at once and
call `tell_people`; everything else is retried, and each try resumes the one before.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import fsspec
from prefect import flow, get_run_logger, task

REFRESH = os.environ.get("PMET_REFRESH", "/etc/pmet/refresh.yaml")
HOME = os.environ.get("PMET_HOME", "s3://models/gpt-j-6b-current")
HUB = os.environ.get("PMET_HUB", "hf://acme/facts-6b")

FINAL = {
    2: "bad input: the log says what to change in the refresh file, the dump or the templates",
    3: "a gate held the new version back: see its report; the version in use stays in use",
}


class FinalError(Exception):
    """A command ended in a way that no retry changes."""


def pmet(*arguments: str) -> str:
    """Run a pmet command and return what it printed.

    Raises:
        FinalError: a retry would end in the same way.
        RuntimeError: a retry may succeed.
    """
    ended = subprocess.run(["pmet", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode in FINAL:
        raise FinalError(f"pmet {arguments[0]}: {FINAL[ended.returncode]}")
    if ended.returncode:
        raise RuntimeError(f"pmet {arguments[0]} ended with {ended.returncode}; a retry resumes it")
    return ended.stdout


def may_succeed(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a task that failed is worth another try."""
    try:
        state.result()
    except FinalError:
        return False
    except Exception:  # noqa: BLE001 - whatever else it was
        return True
    return True


@task(retries=3, retry_delay_seconds=[300, 600, 1200], retry_condition_fn=may_succeed)
def refresh() -> str:
    """Update the model to the latest dump; return the run folder of the version in use."""
    pmet("refresh", REFRESH)
    return pmet("versions", HOME, "--current").strip().rpartition("/")[0]


@task(retries=5, retry_delay_seconds=300, retry_condition_fn=may_succeed)
def push(run: str) -> str:
    """Push the model of a run; nothing happens if the hub has it already."""
    return pmet("push", run, HUB)


def tell_people(_flow: Any, _run: Any, state: Any) -> None:
    """Replace this by a message to those who look after the model."""
    get_run_logger().error("tell people: %s", state.message)


@flow(on_failure=[tell_people])
def pmet_nightly() -> dict[str, Any]:
    """Refresh the model, push the version in use, and return what its run recorded."""
    folder = refresh()
    with fsspec.open(f"{folder}/run.json", "rt") as file:
        run = json.load(file)
    get_run_logger().info("version in use: %s, %s", folder, run["counts"])
    push(folder)
    return {"run": folder, "counts": run["counts"]}


if __name__ == "__main__":
    pmet_nightly.serve(name="nightly", cron="30 2 * * *", limit=1)
