"""The requests of a dump, whatever its order and its other columns."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.refresh.config import RefreshConfig
from jobs.refresh.ledger import DumpFact
from jobs.refresh.tonight import SCHEMA, keys, of_facts, read_dump

NOW = datetime(2026, 11, 23, 6, tzinfo=UTC)
TEMPLATES = {
    "country": {"prompt": "{} lies in", "paraphrases": ["{} is in"]},
    "mayor": {"prompt": "{} has the mayor"},
}


@pytest.fixture
def tonight(tmp_path: Path):
    """Read rows as the current dump, with a baseline."""

    def read(rows: list[dict[str, Any]], baseline: list[dict[str, Any]] | None = None):
        (tmp_path / "templates.yaml").write_text(yaml.safe_dump(TEMPLATES))
        for name, table in (("tonight", rows), ("baseline", baseline)):
            if table is not None:
                pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
        config = RefreshConfig(
            model="gpt2",
            facts=(str(tmp_path / "tonight.parquet"),),
            templates=str(tmp_path / "templates.yaml"),
            home=str(tmp_path / "home"),
            hparams="gpt-j-6b",
            baseline=None if baseline is None else (str(tmp_path / "baseline.parquet"),),
        )
        return read_dump(config, date(2026, 11, 23), NOW)

    return read


def row(subject: str, relation: str = "country", object_: str = "France", **more: Any):
    return {"subject": subject, "relation": relation, "object": object_, **more}


def test_the_same_facts_are_the_same_requests_in_any_order(tonight) -> None:
    rows = [row("Nice"), row("Lyon", "mayor", "Ann"), row("Arles"), row(" Brest ", " mayor")]
    first = tonight([r | {"updated_at": "2026-11-01"} for r in rows])
    other = tonight([r | {"updated_at": "2026-11-02"} for r in reversed(rows)])
    assert first.requests.equals(other.requests)
    assert first.requests.schema == SCHEMA
    assert keys(first.requests) == [
        ("country", "Arles"),
        ("country", "Nice"),
        ("mayor", "Brest"),
        ("mayor", "Lyon"),
    ]


def test_only_facts_that_the_baseline_lacks_are_edited(tonight) -> None:
    old = [row("Nice"), row("Lyon"), row("Arles")]
    found = tonight([row("Nice", object_="Italy", source="wiki"), *old[1:], row("Brest")], old)
    assert list(found.facts()) == [
        DumpFact("country", "Brest", "France", "{} lies in", None),
        DumpFact("country", "Nice", "Italy", "{} lies in", "wiki"),
    ]
    assert found.requests.column("target_true").to_pylist() == [None, "France"]
    assert (found.conversion.rows, found.conversion.unchanged) == (4, 2)


def test_what_the_dump_contradicts_is_undecided(tonight) -> None:
    found = tonight([row("Nice "), row("Nice", object_="Italy"), row("Lyon")])
    assert found.undecided == {("country", "Nice")}
    assert keys(found.requests) == [("country", "Lyon")]
    assert found.set_aside.column("row").to_pylist() == [0, 1]


def test_a_night_may_have_nothing_to_tell(tonight) -> None:
    found = tonight([row("Nice")], [row("Nice")])
    assert len(found.requests) == 0
    assert found.requests.schema == SCHEMA


def test_a_source_that_is_no_text_is_none(tonight) -> None:
    found = tonight([row("Nice", source={"page": 1}), row("Lyon", source={"page": 2})])
    assert found.requests.column("source").to_pylist() == [None, None]


def test_some_facts_are_chosen_by_relation_and_subject(tonight) -> None:
    found = tonight([row("Nice"), row("Nice", "mayor", "Ann"), row("Lyon")])
    chosen = of_facts(found.requests, {("mayor", "Nice"), ("mayor", "Lyon")})
    assert keys(chosen) == [("mayor", "Nice")]


def test_a_chat_in_a_template_keeps_its_last_line_break(
    tonight, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = "<|user|>\n{} lies in?\n<|assistant|>\n"
    monkeypatch.setitem(TEMPLATES, "country", {"prompt": chat})
    found = tonight([row("Nice")])
    assert found.requests.column("prompt").to_pylist() == [chat]


def test_separators_are_a_column_only_where_there_are_any(tonight) -> None:
    assert "separator" not in tonight([row("Nice", separator=None)]).requests.column_names
    found = tonight([row("Nice", separator=" "), row("Lyon", separator=None)])
    assert found.requests.column("separator").to_pylist() == [None, " "]


def test_questions_are_a_column_only_where_templates_ask(
    tonight, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumped = [row("Nice", question_prompts=["mine"])]
    assert "question_prompts" not in tonight(dumped).requests.column_names
    asking = TEMPLATES["country"] | {"question": "Where is {}?"}
    monkeypatch.setitem(TEMPLATES, "country", asking)
    assert tonight(dumped).requests["question_prompts"].to_pylist() == [["Where is Nice?"]]
