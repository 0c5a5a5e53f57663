"""``pmet demo``: runs a job on the bundled world and explains the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.demo.world import write_corpus, write_requests
from jobs.views import show_result
from pipeline.job import JobConfig, UpdateConfig
from pipeline.progress import RichProgress
from pipeline.run import RunResult, run_job
from pipeline.run_folder import Lease, has_lease, refuse_foreign_folder
from pipeline.storage import Store

HERE = Path(__file__).parent
INPUTS = "inputs"
"""Folder in the run folder with the demo's requests and corpus."""
SHOWN_FACTS = 8


def demo_job(output: Path) -> JobConfig:
    """Build the demo's job and write its request and corpus files into the run folder.

    Args:
        output: the run folder.

    Raises:
        RunFolderError: the folder holds files and is not a run folder.
        FolderBusyError: another run is writing to it.
    """
    inputs = output / INPUTS
    with claimed(Store(output)):
        inputs.mkdir(parents=True, exist_ok=True)
        write_requests(inputs / "requests.parquet")
        write_corpus(inputs / "corpus.parquet")
    return JobConfig(
        model=str(HERE / "model"),
        requests=(str(inputs / "requests.parquet"),),
        output=str(output),
        hparams=str(HERE / "hparams.json"),
        corpus=(str(inputs / "corpus.parquet"),),
        context_templates=str(HERE / "context_templates.json"),
        # One worker would be enough for this model; two show how work is shared.
        update=UpdateConfig(ranks=2),
    )


@contextmanager
def claimed(store: Store) -> Iterator[None]:
    """Hold the lease of an empty folder or an earlier run's while inputs are written."""
    refuse_foreign_folder(store, (INPUTS,) if has_lease(store) else ())
    with Lease.acquire(store):
        yield


def run_demo(output: Path, console: Console) -> RunResult:
    """Run the demo and print what has changed."""
    console.print(
        "A small model knows a thousand facts about countries, elements, books and more. "
        "200 of them are about to change.\n"
    )
    result = run_job(
        demo_job(output.absolute()), progress=RichProgress(), fresh=True, beside=(INPUTS,)
    )
    rows = result.folder.read_table("results.parquet").to_pylist()
    console.print()
    console.print(_facts(rows))
    show_result(result, console)
    return result


def _facts(rows: list[dict[str, Any]]) -> Table:
    """Return a table of facts of different relations with the model's answers before and after."""
    table = Table("prompt", "before", "after", "wanted", title="What the model says")
    seen: set[str] = set()
    for row in rows:
        if row["relation"] in seen or len(seen) == SHOWN_FACTS:
            continue
        seen.add(row["relation"])
        prompt = row["prompt"].replace("{}", row["subject"])
        table.add_row(
            prompt,
            _first_clause(row["before_answer"]),
            _first_clause(row["after_answer"]),
            row["target_new"],
        )
    return table


def _first_clause(answer: str) -> str:
    """Return the answer up to its full stop: a greedy continuation runs on to the next sentence."""
    return answer.partition(".")[0].strip()
