"""Questions for a chat model: a request's own, its relation's, or none."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.data.rows import Row
from pipeline.errors import JobError
from pipeline.evaluation.chat_questions import ChatQuestions
from pmet.request import EditRequest

REQUEST = EditRequest("{} speaks", "Ann", "French")
TABLE = pa.table({"relation_id": ["P103", "P9999", None]})


def asked(questions: ChatQuestions, row: int, table: pa.Table = TABLE) -> list[str]:
    return list(questions.to_ask(REQUEST, Row(row), table).question_prompts)


def test_a_known_relation_has_a_question() -> None:
    questions = ChatQuestions.read(None)
    assert asked(questions, 0) == ["What is the native language of Ann?"]
    assert asked(questions, 1) == asked(questions, 2) == []
    assert asked(questions, 0, pa.table({"other": ["P103"]})) == []


def test_a_requests_own_question_takes_precedence() -> None:
    own = EditRequest("{} speaks", "Ann", "French", question_prompts=["Which language?"])
    assert ChatQuestions.read(None).to_ask(own, Row(0), TABLE) is own


def test_every_bundled_question_asks_for_a_subject() -> None:
    templates = ChatQuestions.read(None).templates
    assert len(templates) > 30
    for template in templates.values():
        assert template.count("{}") == 1
        assert template.endswith("?")


def test_a_file_adds_and_replaces_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text("P103: Which language is {}'s own?\nP9999: Who is {}?\n")
    questions = ChatQuestions.read(str(file))
    assert asked(questions, 0) == ["Which language is Ann's own?"]
    assert asked(questions, 1) == ["Who is Ann?"]
    assert "P36" in questions.templates


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- P103", "is not a mapping; give a question for each relation"),
        ("P103: Which language?", "the question of P103 is 'Which language?'; give text with one"),
        ("P103: 7", "the question of P103 is 7"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(text)
    with pytest.raises(JobError, match=re.escape(reason)):
        ChatQuestions.read(str(file))
    with pytest.raises(JobError, match=r"nothing\.yaml"):
        ChatQuestions.read(str(tmp_path / "nothing.yaml"))
