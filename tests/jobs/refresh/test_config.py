"""Refresh files: what is accepted, and what is refused."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from jobs.refresh.config import load_refresh
from pipeline.errors import JobError
from tests.conftest import ROOT

SMALLEST = """
model: gpt2
facts: facts/{date}/*.parquet
templates: templates.yaml
home: home
hparams: gpt-j-6b
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "refresh.yaml"
    path.write_text(SMALLEST)
    return path


def test_the_date_of_the_night_finds_its_dump(file: Path) -> None:
    config = load_refresh(file, ['facts=["a/{date}", b]'])
    assert config.facts_of(date(2026, 3, 1)) == ("a/2026-03-01", "b")


def test_the_example_is_a_refresh_file() -> None:
    config = load_refresh(ROOT / "examples" / "refresh.yaml")
    assert config.gates.thresholds()["efficacy"] == 0.95
    assert config.facts_of(date(2026, 11, 2)) == ("s3://facts/2026-11-02/",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keep=0", "keep: 0 is not allowed; give a whole number, 1 or more"),
        ("time_zone=Europe/Berlim", "is not allowed; give a time zone, such as UTC"),
        ("time_zone=../../etc/passwd", "is not allowed; give a time zone"),
        ("most_removed=2", "give a fraction from 0 to 1, or null"),
        ("columns=entity", "give a mapping from our column names to the dump's"),
        ("requests=x", "unknown key requests"),
        ("target.store=x", "did you mean targets.store"),
    ],
)
def test_what_is_wrong_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(JobError, match="(?s).*" + message):
        load_refresh(file, [override])


def test_sections_are_those_of_a_job(file: Path) -> None:
    file.write_text(SMALLEST + "columns: {subject: entity}\ntargets: {workers: 3}\n")
    config = load_refresh(file, ["gates.efficacy=0.9"])
    assert (config.columns, config.targets.workers) == ({"subject": "entity"}, 3)
    assert config.gates.thresholds() == {"efficacy": 0.9}
