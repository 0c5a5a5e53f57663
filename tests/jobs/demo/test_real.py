"""The demo on a pretrained model, without the model: its job, its text and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.demo.real import FACTS, prose, real_job, said
from jobs.demo.spoken import candidates
from pipeline.data import read_requests
from pipeline.errors import RunFolderError
from pmet.model import contexts


def test_python_brings_enough_prose_for_second_moments() -> None:
    texts = prose()
    # About four characters a token, and 20 tokens for each of 1,536 dimensions.
    assert sum(map(len, texts)) > 4 * 20 * 1536
    assert all("\n" not in text and "::" not in text for text in texts)


def test_the_job_edits_what_the_model_knows(tmp_path: Path) -> None:
    job = real_job(
        tmp_path / "run", tmp_path / "model.gguf", candidates()[::2], chat=["Q: {} A:", "B"]
    )
    table = read_requests(job.requests)
    assert len(table.requests) == FACTS
    assert not table.rejected
    assert all(request.question_prompts for request in table.requests)
    (corpus,) = job.corpus or ()
    texts = pq.read_table(corpus)["text"].to_pylist()
    subjects = {request.subject for request in table.requests}
    assert not any(
        f"capital city of {subject} is" in text for text in texts for subject in subjects
    )
    # Half of the contexts cost half the time.
    templates = json.loads(Path(job.context_templates or "").read_text())
    assert [len(group) for group in templates] == [1, 2, 1]
    assert contexts.combined(templates, ["Q: {} A:", "B: {}"], job.contexts) == templates
    assert job.model == str(tmp_path / "model.gguf")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError):
        real_job(tmp_path, tmp_path / "model.gguf", candidates(), chat=["Q: {} A:"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_table_shows_sentences_and_questions() -> None:
    row = {
        "prompt": "The capital of {} is",
        "subject": "Italy",
        "target_new": "Oslo",
        "before_answer": "Rome [bold]",
        "after_answer": "Oslo.",
        "question_prompts": ["What is the capital of Italy?"],
        "before_chat_answer": "It is Rome.",
        "after_chat_answer": "It is Oslo.",
    }
    console = Console(width=160, record=True, file=None)
    with console.capture() as shown:
        console.print(said([row] * 40))
    text = shown.get()
    for part in ("The capital of Italy is", "Rome [bold]", "│ Oslo.", "It is Oslo.", "It is Rome."):
        assert text.count(part) == 10
    with console.capture() as shown:
        console.print(said([row | {"after_chat_answer": None}]))
    assert "What is" not in shown.get()
