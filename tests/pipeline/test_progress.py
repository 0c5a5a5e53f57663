"""Progress reports of a run."""

from __future__ import annotations

import re
import time
from io import StringIO

import pytest
from rich.console import Console

from pipeline.events import EventKind
from pipeline.progress import CountedStage, LineProgress, RichProgress, Stage


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


def shown(width: int) -> tuple[RichProgress, StringIO]:
    file = StringIO()
    return RichProgress(
        Console(file=file, force_terminal=True, width=width, color_system=None)
    ), file


def screens(file: StringIO) -> list[str]:
    """The successive states of a bar, without control sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", file.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in plain.split("\n") if line.strip()]


@pytest.mark.parametrize("width", [120, 60])
def test_a_bar_shows_the_time_of_the_whole_stage(width: int) -> None:
    progress, file = shown(width)
    with progress.stage("measure before", 41_234) as stage:
        stage.advance(41_234)
        stage.note("40 of 40 requests, 96 of 96 texts")
        time.sleep(1.2)
    *before, last = screens(file)
    assert all(len(line) <= width for line in before)
    # All that is counted is done, but the stage is not.
    full = [line for line in before if "41,234/41,234 tokens" in line]
    assert full
    assert not any("✓" in line for line in full[:2])
    assert all("-:--:--" in line for line in full[:2])
    assert "✓ measure before" in last
    assert "41,234/41,234 tokens 0:00:01" in last
    assert ("40 of 40 requests, 96 of 96 texts" in last) == (width == 120)


def test_a_stage_of_unknown_size_shows_no_count() -> None:
    progress, file = shown(100)
    with progress.stage("plan"):
        pass
    assert screens(file)[-1].startswith("✓ plan")
    assert "/" not in screens(file)[-1]
