"""A run's figures in Ray's metrics, as Prometheus reads them."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import unquote

import pytest
import ray

from pipeline.cluster.metering import MeteredProgress
from pipeline.events import EventKind
from pipeline.progress import LineProgress, Progress

PATIENCE_S = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "200")
        # Started like a cluster: a run's own Ray has no metrics agent.
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def lines_of_metrics() -> list[str]:
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return [line for line in answer.read().decode().splitlines() if "pmet_" in line]


def value(name: str, *tags: str, awaited: float | None = None) -> float | None:
    """Return the value of a metric with these tags as soon as Ray exports it.

    Values before the expected one are returned only if that never comes.
    """
    end, found = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < end:
        for line in lines_of_metrics():
            if line.startswith(f"ray_{name}") and all(tag in line for tag in tags):
                found = float(line.rpartition(" ")[2])
                if awaited in (None, found):
                    return found
        time.sleep(0.2)
    return found


def test_a_run_is_exported_as_metrics(cluster: None) -> None:
    progress = MeteredProgress(Progress())
    progress.begin("s3://runs/1", 2, None)
    with progress.stage("targets", 40) as stage:
        stage.skip(4)
        time.sleep(0.01)
        stage.advance(6)
        stage.shard("00001")
        stage.shard("00002")
    progress.event(EventKind.RETRY, "it died", shard="00003", attempt=1)
    run = 'run="s3://runs/1"'
    assert value("pmet_stage_done", run, 'stage="targets"', awaited=10) == 10
    assert value("pmet_stage_total", run, 'stage="targets"', awaited=40) == 40
    assert value("pmet_stage_rate", run, 'stage="targets"') > 0  # type: ignore[operator]
    assert value("pmet_shards_done", run, awaited=2) == 2
    assert value("pmet_events", run, 'kind="retry"', awaited=1) == 1


def test_a_run_of_any_name_is_exported_in_ascii(cluster: None) -> None:
    name = 'runs/läuf 日本 100% "x"\\y'
    progress = MeteredProgress(Progress())
    progress.begin(name, 1, None)
    with progress.stage("zählen", 2) as stage:
        stage.advance(2)
        stage.shard("00001")
    progress.event(EventKind.DEATH, "verloren: läuf")
    assert value("pmet_shards_done", "%25", awaited=1) == 1
    (line,) = [line for line in lines_of_metrics() if "pmet_stage_done" in line and "%25" in line]
    assert line.isascii()
    tags = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', line))
    # Prometheus escapes quotes and backslashes in tags with a backslash.
    run = re.sub(r"\\(.)", r"\1", tags["run"])
    assert run == 'runs/l%C3%A4uf %E6%97%A5%E6%9C%AC 100%25 "x"\\y'
    assert unquote(run) == name
    assert unquote(tags["stage"]) == "zählen"


def test_what_is_shown_is_shown_all_the_same() -> None:
    lines: list[str] = []
    progress = MeteredProgress(LineProgress(lines.append, every_s=0))
    progress.begin("runs/1", 1, "pmet-1")
    with progress.stage("targets", 2) as stage:
        stage.advance()
        stage.shard("00001")
    progress.event(EventKind.DEATH, "worker 1 was lost", shard="00001", attempt=2)
    events = [line.split()[4] for line in lines]
    assert events == [f"event={e}" for e in ("begin", "progress", "shard", "end", "death")]
