"""``pmet demo --real``: edits facts that a pretrained chat model knows, and shows what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.demo.pretrained import pretrained_model
from jobs.demo.show import INPUTS, claimed
from jobs.demo.spoken import (
    SCHEMA,
    candidates,
    question_of,
    requests_among,
    statements,
)
from jobs.demo.world import Fact
from jobs.views import show_result
from pipeline.events import ASK
from pipeline.job import EditSettings, JobConfig
from pipeline.models import ModelSource, default_cache, open_model_folder
from pipeline.progress import RichProgress, Stage
from pipeline.run import RunResult, run_job
from pipeline.storage import Store
from pmet.evaluation import Prompts, score_continuations
from pmet.model import contexts

FACTS = 40
SHOWN_FACTS = 10
SETTINGS: dict[str, Any] = {
    "hparams": str(Path(__file__).parent / "real_hparams.json"),
    "contexts": "both",
    "targets": {"end": "stop"},
    "evaluate": {"perplexity_tokens": 4096},
}
PREFIXES = ("The-1998-2000. {}", "Therefore, a single-passage is a process where. {}")
"""Written by the model, as a run would let it write five."""
_SHORTEST = 200
"""Characters of a paragraph that counts as prose."""
_PROSE = 0.75
"""Share of letters and spaces of prose."""


def run_real_demo(output: Path, console: Console) -> RunResult:
    """Run the demo on a pretrained model and print what has changed.

    Raises:
        ModelError: the model cannot be downloaded or read.
    """
    console.print(
        f"A pretrained chat model, SmolLM2-135M-Instruct, is asked what it knows about the world; "
        f"{FACTS} facts that it knows are about to change.\n"
    )
    output = output.absolute()
    progress = RichProgress()
    model = pretrained_model()
    with progress.stage(ASK) as bar:
        bar.note("opening the model, which is dequantised the first time")
        folder = open_model_folder(str(model), default_cache())
        bar.note("")
        known, chat = _known(folder, bar)
    job = real_job(output, model, known, chat=chat)
    result = run_job(job, progress=progress, fresh=True, beside=(INPUTS,))
    rows = result.folder.read_table("results.parquet").to_pylist()
    console.print()
    console.print(said(rows))
    show_result(result, console)
    return result


def real_job(output: Path, model: Path, known: Sequence[Fact], *, chat: Sequence[str]) -> JobConfig:
    """Build the job and write its input files into the run folder.

    Args:
        output: the run folder.
        model: the model's file.
        known: facts that the model knows.
        chat: context templates in the model's form of chat; the first one is used.

    Raises:
        RunFolderError: the folder holds files and is not a run folder.
        FolderBusyError: another run is writing to it.
    """
    inputs = output / INPUTS
    rows = requests_among(known, FACTS)
    texts = [*statements([row["subject"] for row in rows]), *prose()]
    with claimed(Store(output)):
        inputs.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), inputs / "requests.parquet")
        pq.write_table(pa.table({"text": texts}), inputs / "corpus.parquet")
        templates = [["{}"], list(PREFIXES), list(chat[:1])]
        (inputs / "context_templates.json").write_text(json.dumps(templates, indent=1))
    return JobConfig(
        model=str(model),
        requests=(str(inputs / "requests.parquet"),),
        output=str(output),
        corpus=(str(inputs / "corpus.parquet"),),
        context_templates=str(inputs / "context_templates.json"),
        **EditSettings.model_validate(SETTINGS).model_dump(exclude_unset=True),
    )


def prose() -> list[str]:
    """Ordinary English at hand on every machine: paragraphs of Python's own documentation."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    paragraphs = (
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in str(topics[name]).split("\n\n")
    )
    return [text for text in paragraphs if _is_prose(text)]


def said(rows: Sequence[dict[str, Any]]) -> Table:
    """A table of what the model says, in sentences to complete and in chat, before and after."""
    table = Table("asked", "before", "after", "wanted", title="What the model says")
    for row in rows[:: max(1, len(rows) // SHOWN_FACTS)][:SHOWN_FACTS]:
        prompt = row["prompt"].replace("{}", row["subject"])
        asked = (prompt, row["before_answer"], row["after_answer"], row["target_new"])
        table.add_row(*map(Text, asked))
        if row["after_chat_answer"] is not None:
            chat = (row["question_prompts"][0], row["before_chat_answer"], row["after_chat_answer"])
            table.add_row(*map(Text, chat), "", style="dim")
    return table


def _known(folder: Path, bar: Stage) -> tuple[list[Fact], list[str]]:
    """The facts of the world that a model knows, and its context templates in chat.

    It knows a fact if it completes the sentence with the object.
    """
    model, tokenizer = ModelSource(str(folder), on_gpu=False).open()
    asked = {question_of(fact): fact for fact in candidates()}
    bar.total(len(asked))
    scored = score_continuations(
        model, Prompts(tokenizer), list(asked), on_progress=lambda count: bar.advance(count)
    )
    known = [fact for pair, fact in asked.items() if scored[pair].greedy]
    return known, contexts.in_chat(tokenizer)


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= _SHORTEST and letters >= _PROSE * len(text) and "::" not in text
