"""Progress reports of a run."""

from __future__ import annotations

import re

import pytest

from pipeline.events import EventKind
from pipeline.progress import CountedStage, LineProgress, Stage


@pytest.fixture
def lines() -> list[str]:
    return []


def of(line: str, *keys: str) -> list[str | None]:
    """Return the keys and values of a logfmt line."""
    found = (re.search(rf'(?:^| ){key}=("(?:[^"\\]|\\.)*"|\S*)', line) for key in keys)
    return [match[1] if match else None for match in found]


def test_every_line_names_run_and_attempt(lines: list[str]) -> None:
    progress = LineProgress(lines.append, every_s=0)
    progress.begin("s3://runs/my run", 3, "pmet-my-run-3")
    with progress.stage("targets", 10) as stage:
        stage.advance(4)
        stage.shard("00002")
    progress.event(EventKind.RETRY, 'it said\n"no"', shard="00007", attempt=1)
    for line in lines:
        assert "\n" not in line
        said = of(line, "run", "attempt", "submission")
        assert said == ['"s3://runs/my run"', "3", "pmet-my-run-3"]
    assert of(lines[1], "event", "stage", "done", "total") == ["progress", "targets", "4", "10"]
    assert of(lines[2], "event", "shard") == ["shard", "00002"]
    last = of(lines[-1], "event", "shard", "shard_attempt", "text")
    assert last[:3] == ["retry", "00007", "1"]
    assert last[3] is not None
    assert r"it said\n\"no\"" in last[3]


def test_a_running_stage_is_reported_from_time_to_time(lines: list[str]) -> None:
    with LineProgress(lines.append, every_s=60).stage("targets", 1000) as stage:
        for _ in range(1000):
            stage.advance()
    assert [of(line, "event") for line in lines] == [["begin"], ["end"]]


def test_what_was_there_before_does_not_count_for_the_rate() -> None:
    told: list[dict[str, object]] = []
    stage = CountedStage(Stage(), 10, told.append)
    stage.skip(5)
    assert told[-1] == {"done": 5, "total": 10, "rate": None}
    stage.advance(1)
    assert (told[-1]["done"], told[-1]["rate"] is not None) == (6, True)
    stage.total(20)
    assert told[-1]["total"] == 20
