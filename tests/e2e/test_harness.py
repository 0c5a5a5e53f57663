"""General abilities as a gate: tasks of lm-evaluation-harness in whole runs, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.failure import explain
from pipeline.errors import JobError, WorkerError
from pipeline.harness.answering import Part
from pipeline.job.config import JobConfig
from pipeline.plan import make_plan
from pipeline.run import run_job
from pipeline.workers.worker import ModelWorker
from tests.conftest import GOLDEN
from tests.e2e.conftest import HERE, job

pytestmark = pytest.mark.usefixtures("datasets_cache")

DATA = Path(__file__).parents[1] / "pipeline" / "harness" / "data"
Asked = list[tuple[str, int]]


@pytest.fixture
def make(inputs: Path, tmp_path: Path) -> Callable[..., JobConfig]:
    """Makes jobs of two facts in this process, with two tasks and stores."""
    table = pq.read_table(inputs / "requests.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "few.parquet")
    golden = GOLDEN / "gpt2"

    def made(output: str = "out", **changed: Any) -> JobConfig:
        values = {
            "requests": (str(tmp_path / "few.parquet"),),
            "corpus": None,
            "second_moments": str(golden / "second_moments.safetensors"),
            "context_templates": str(golden / "context_templates.json"),
            "evaluate": {
                "answers": 0,
                "store": str(tmp_path / "store"),
                "harness": {"tasks": [str(DATA)], "limit": 6, "num_fewshot": 2},
            },
            "gates": {"harness_drop": 1.0},
            "targets": HERE["targets"] | {"store": str(tmp_path / "targets")},
            "update": HERE["update"],
        }
        return job(inputs, str(tmp_path / output), **values | changed)

    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The model's folder name and the number of requests, for each part that is answered."""
    seen: Asked = []
    answer = ModelWorker.answer_harness

    def noting(self: ModelWorker, source: Any, part: Part) -> Any:
        seen.append((Path(source.folder).parent.name, len(part.arguments)))
        return answer(self, source, part)

    monkeypatch.setattr(ModelWorker, "answer_harness", noting)
    return seen


def test_a_failing_gate_holds_the_model_back_and_the_base_is_measured_once(
    make: Callable[..., JobConfig], asked: Asked, tmp_path: Path
) -> None:
    gates = {"harness": 0.999, "harness_drop": 1.0, "harness_task_drop": 1.0}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(make(gates=gates).model_dump(mode="json", exclude_none=True)))
    done = CliRunner().invoke(app, ["run", str(file)])
    assert done.exit_code == 3, done.output
    assert "held back: harness is" in done.output
    assert "general" in done.output
    assert asked == [("gpt2", 6), ("gpt2", 24), ("out", 6), ("out", 24)]

    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    cities, trades = metrics["harness"]["tasks"]
    assert [(row["name"], row["documents"]) for row in (cities, trades)] == [
        ("cities", 6),
        ("trades", 6),
    ]
    assert (trades["metric"], trades["num_fewshot"]) == ("acc", 2)
    for row in (cities, trades):
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["drop"] == pytest.approx(-row["difference"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    for when in ("before", "after"):
        mean = (cities[when] + trades[when]) / 2
        assert metrics[when]["harness"] == pytest.approx(mean)
        low, high = metrics["intervals"][when]["harness"]
        assert low <= mean <= high
    drops = [row["drop"] for row in (cities, trades)]
    assert metrics["harness"]["largest_drop"] == max(drops)
    assert {gate["name"]: (gate["value"], gate["passed"]) for gate in metrics["gates"]} == {
        "harness": (metrics["after"]["harness"], False),
        "harness_drop": (pytest.approx(sum(drops) / 2), True),
        "harness_task_drop": (max(drops), True),
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<h2 id="abilities">General abilities</h2>' in page
    assert "exact_match (stripped)" in page
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "| `trades` | `acc` | 6 |" in card
    stages = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]
    assert {"harness before", "harness after"} <= {stage["name"] for stage in stages}

    # The same job again asks nothing; another one asks only its own edited model.
    asked.clear()
    assert run_job(make()).status == "complete"
    assert asked == []
    other = run_job(make("other"))
    assert asked == [("other", 6), ("other", 24)]
    assert other.metrics["before"]["harness"] == metrics["before"]["harness"]


def test_a_run_that_ends_amid_tasks_goes_on_with_the_next_one(
    make: Callable[..., JobConfig], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = make().evaluate.model_dump(mode="json") | {"store": None}
    noting = ModelWorker.answer_harness

    def failing(self: ModelWorker, source: Any, part: Part) -> Any:
        if part.kind == "loglikelihood":
            raise RuntimeError("the disk of the worker is gone")
        return noting(self, source, part)

    monkeypatch.setattr(ModelWorker, "answer_harness", failing)
    with pytest.raises(WorkerError, match="the disk of the worker is gone"):
        run_job(make(evaluate=evaluate))
    assert asked == [("gpt2", 6)]
    monkeypatch.setattr(ModelWorker, "answer_harness", noting)
    assert run_job(make(evaluate=evaluate)).status == "complete"
    assert asked == [("gpt2", 6), ("gpt2", 24), ("out", 6), ("out", 24)]


def test_bad_tasks_stop_the_job_before_any_work(
    make: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = {"harness": ["./nowhere.yaml"]}
    with pytest.raises(JobError, match=r"there is no file or folder \./nowhere") as error:
        make_plan(make(evaluate=nowhere))
    assert explain(error.value, "run") == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    with pytest.raises(JobError, match=r"gates.harness_drop needs tasks of lm-evaluation-harness"):
        make_plan(make(evaluate={}))


def test_a_job_may_not_write_into_its_tasks(make: Callable[..., JobConfig], tmp_path: Path) -> None:
    inside = {"harness": [str(tmp_path / "out" / "tasks")]}
    with pytest.raises(JobError, match=r"^evaluate\.harness: .* could be overwritten or deleted"):
        make_plan(make(evaluate=inside))


def test_pmet_evaluate_measures_and_compares_tasks(tmp_path: Path, inputs: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(inputs / "requests.parquet").slice(0, 2), few)
    model = str(GOLDEN / "gpt2" / "model")
    output = tmp_path / "figures.json"
    command = ["evaluate", model, str(few), "--answers", "0", "--harness", str(DATA)]
    command += ["--harness-limit", "4", "--harness-fewshot", "1", "--output", str(output)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    alone = json.loads(output.read_text())
    assert [row["documents"] for row in alone["harness_tasks"]["tasks"]] == [4, 4]
    assert alone["harness_tasks"]["limit"] == 4
    low, high = alone["intervals"]["harness"]
    assert low <= alone["harness"] <= high
    done = CliRunner().invoke(app, [*command, "--base", model])
    assert done.exit_code == 0, done.output
    for row in json.loads(output.read_text())["harness_tasks"]["tasks"]:
        assert row["difference"] == row["drop"] == 0
        assert row["interval"][0] < 0 < row["interval"][1]
