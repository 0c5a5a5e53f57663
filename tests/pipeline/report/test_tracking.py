"""Trackers: what they record, and that their failures never fail a run."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import run
from pipeline.errors import JobError, WorkerError
from pipeline.job.config import JobConfig, dump_job, load_job
from pipeline.plan import Plan, make_plan
from pipeline.report import tracking
from pipeline.report.tracking import Tracking, tracked, trackers_of, without_secrets
from pipeline.run import RunResult, run_plan
from pipeline.storage.store import Store
from tests.conftest import GOLDEN
from tests.pipeline.report.test_run_report import GATES, figures, rejected_of, results_of

GPT2 = GOLDEN / "gpt2"


def job_of(folder: Path, **asked: str) -> JobConfig:
    """A job with these trackers."""
    values = {
        "model": str(GPT2 / "model"),
        "requests": ("a.parquet", "b.parquet"),
        "output": str(folder / "run"),
        "hparams": "gpt-j-6b",
        "tracking": asked,
    }
    return JobConfig.model_validate(values)


def finished(store: Store) -> Store:
    """The files that a finished run leaves."""
    status = {
        "status": "complete",
        "started_at": "2026-11-23T02:00:00+00:00",
        "finished_at": "2026-11-23T02:00:10+00:00",
        "stages": [{"name": "targets", "seconds": 4.0, "detail": {"found": 30}}],
        "layers": [
            {"parameter": "h.3.w", "delta_norm": 2.0, "weight_norm": 100.0, "requests": 30},
        ],
    }
    store.write_json("run.json", status)
    store.write_json(
        "metrics.json",
        {
            "before": figures(0.1) | {"perplexity": None},
            "after": figures(0.9) | {"perplexity": 21.0},
            "counts": {"requested": 33, "rejected": 3, "edited": 30},
            "gates": GATES[:1],
        },
    )
    store.write_table("results.parquet", results_of(30))
    store.write_table("rejected.parquet", rejected_of(3))
    store.write_bytes("report.html", b"<!doctype html>")
    store.write_bytes("job.yaml", b"model: x\n")
    return store


def follow(job: JobConfig, store: Store, status: Any = "complete") -> list[tuple[str, str]]:
    """Track a run from start to end; return the events."""
    events: list[tuple[str, str]] = []
    told = Tracking(trackers_of(job), lambda kind, text, **_: events.append((kind, text)))
    told.begin(job, "digest")
    told.end(store, status)
    return events


def test_tensorboard_shows_scores_times_and_norms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = finished(Store(tmp_path / "run"))
    assert follow(job_of(tmp_path, tensorboard=str(tmp_path / "tb"), name="tonight"), store) == []
    events = EventAccumulator(str(tmp_path / "tb" / "tonight")).Reload()
    scalars = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    wanted = {
        "before/efficacy": 0.1,
        "after/efficacy": 0.9,
        "after/perplexity": 21.0,
        "counts/edited": 30.0,
        "seconds/targets": 4.0,
        "seconds/run": 10.0,
        "rate/targets": 7.5,
        "delta_norm/h.3.w": 2.0,
        "share/h.3.w": 0.02,
        "gates/passed": 1.0,
    }
    assert {name: scalars[name] for name in wanted} == pytest.approx(wanted)
    assert "before/perplexity" not in scalars
    said = events.Tensors("job/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| requests | `a.parquet, b.parquet` |" in said
    assert "tracking" not in said


def test_mlflow_has_one_run_for_all_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, store = str(tmp_path / "mlruns"), finished(Store(tmp_path / "run"))
    job = job_of(tmp_path, mlflow=uri, experiment="facts")
    assert follow(job, store, "failed") == []
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("facts").experiment_id
    (first,) = client.search_runs([experiment])
    assert first.info.status == "FAILED"
    assert first.data.metrics == {}
    more = job.model_copy(update={"seed": 5})
    assert follow(more, store, "held") == []
    (second,) = client.search_runs([experiment])
    assert second.info.run_id == first.info.run_id
    assert (second.info.status, second.data.tags["pmet.status"]) == ("FINISHED", "held")
    assert second.info.run_name == "run"
    assert second.data.metrics["after/efficacy"] == pytest.approx(0.9)
    assert second.data.params["requests"] == "a.parquet, b.parquet"
    assert second.data.params["targets.shard_size"] == "auto"
    assert not any(key.startswith("tracking") for key in second.data.params)
    files = {file.path for file in client.list_artifacts(second.info.run_id)}
    assert files == {"report.html", "metrics.json", "job.yaml"}


def test_wandb_keeps_a_run_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    store = finished(Store(tmp_path / "run"))
    assert follow(job_of(tmp_path, wandb="team/facts"), store) == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert {"report.html", "metrics.json"} <= {f.name for f in (folder / "files").iterdir()}
    (log,) = folder.glob("*.wandb")
    names = (b"after/efficacy", b"before/score", b"counts/edited", b"seconds/targets")
    # A separate process writes it, a moment after reporting that it is done.
    end = time.monotonic() + 30
    while (lacking := [n for n in names if n not in log.read_bytes()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert lacking == []


def test_wandb_without_a_key_is_bad_input_without_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setattr(tracking, "_wandb_lets_in", lambda: False)
    with pytest.raises(JobError, match="set WANDB_API_KEY, run wandb login once, or set WANDB_MO"):
        trackers_of(job_of(tmp_path, wandb="facts"))


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_stops_a_job_before_its_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    job = job_of(tmp_path, **{name: "somewhere"}).model_copy(update={"model": "/no/such/model"})
    with pytest.raises(JobError) as caught:
        make_plan(job)
    assert f"tracking.{name} needs the package {name}, which is not installed" in str(caught.value)
    assert "pip install 'pmet-pipeline[tracking]'" in str(caught.value)


def test_nothing_is_tracked_unless_asked(tmp_path: Path) -> None:
    assert trackers_of(job_of(tmp_path)) == {}
    assert follow(job_of(tmp_path), Store(tmp_path / "nothing"), "failed") == []


class Broken:
    """A tracker that fails in one way and records its calls."""

    def __init__(self, at: str, how: Any) -> None:
        self.at, self.how, self.told = at, how, []

    def _do(self, what: str) -> None:
        self.told.append(what)
        if what == self.at:
            self.how()

    def begin(self, run: Any) -> None:
        self._do("begin")

    def figures(self, values: Any) -> None:
        self._do("figures")

    def artifact(self, file: Path) -> None:
        self._do("artifact")

    def end(self, status: str) -> None:
        self._do("end")


def raising(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("at", ["begin", "figures", "artifact", "end"])
@pytest.mark.parametrize("error", [OSError("no route"), SystemExit(3), KeyboardInterrupt()])
def test_a_tracker_that_fails_is_given_up_and_the_others_go_on(
    tmp_path: Path, at: str, error: BaseException
) -> None:
    store, events = finished(Store(tmp_path / "run")), []
    bad, good = Broken(at, raising(error)), Broken("nothing", None)
    told = Tracking({"bad": bad, "good": good}, lambda kind, text, **_: events.append((kind, text)))
    told.begin(job_of(tmp_path), "digest")
    told.end(store, "complete")
    assert told.failed
    ((kind, text),) = events
    assert kind == "warning"
    assert text.startswith("bad is given up at ")
    assert type(error).__name__ in text
    assert bad.told.count(at) == 1
    assert bad.told[-1] == at
    assert good.told == ["begin", "figures", "artifact", "artifact", "artifact", "end"]


def test_a_tracker_that_hangs_is_given_up(tmp_path: Path) -> None:
    events, forever = [], threading.Event()
    hanging = Broken("begin", forever.wait)
    told = Tracking({"slow": hanging}, lambda kind, text, **_: events.append(text), patience=0.05)
    told.begin(job_of(tmp_path), "digest")
    told.end(Store(tmp_path / "nothing"), "complete")
    forever.set()
    assert events == [
        "slow is given up at begin: it did not answer within 0.05 seconds; the run goes on without "
        "it"
    ]


def test_warnings_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "swordfish")
    said = without_secrets("401 for abcdef123456\nat https://me:swordfish@host/x, https://a:b@c")
    assert said == "401 for *** at https://me:***@host/x, https://a:***@c"


def test_parameters_hold_no_passwords(tmp_path: Path) -> None:
    job = job_of(tmp_path).model_copy(update={"corpus": ("https://me:hunter2@host/c.parquet",)})
    assert tracked(job, "digest").params["corpus"] == "https://me:***@host/c.parquet"


def test_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(dump_job(job_of(tmp_path)))
    with pytest.raises(JobError) as caught:
        load_job(file, ["tracking.mlflow=https://me:hunter2@host"])
    assert "hunter2" not in str(caught.value).partition(": ")[2]
    assert "a password goes into the environment" in str(caught.value)


def test_attempts_at_a_run_are_one_and_other_runs_are_others(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    elsewhere = job.model_copy(update={"output": str(tmp_path / "other")})
    names = [tracked(j, d).identity for j, d in ((job, "a"), (job, "b"), (elsewhere, "a"))]
    assert len({*names, tracked(job, "a").identity}) == 3


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan that could be run."""
    folder = tmp_path_factory.mktemp("tracked")
    row = {"prompt": "{} is", "subject": "A", "target_new": "B"}
    import pyarrow as pa

    Store(folder).write_table("requests.parquet", pa.Table.from_pylist([row]))
    values = {
        "model": str(GPT2 / "model"),
        "requests": (str(folder / "requests.parquet"),),
        "output": "unused",
        "hparams": str(GPT2 / "hparams.json"),
        "second_moments": str(GPT2 / "second_moments.safetensors"),
        "context_templates": str(GPT2 / "context_templates.json"),
    }
    return make_plan(JobConfig.model_validate(values))


def test_a_run_ends_well_although_its_tracker_fails(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(context: Any) -> RunResult:
        status = context.folder.status
        finished(context.store)
        context.folder.status = context.store.read_json("run.json") | status
        context.folder.finish("complete")
        return RunResult("complete", context.store, {})

    bad = Broken("figures", raising(ConnectionError("no route to host")))
    monkeypatch.setattr(run, "_run_stages", stages)
    monkeypatch.setattr(run, "trackers_of", lambda job: {"mlflow": bad})
    job = plan.job.model_copy(update={"output": str(tmp_path / "run")})
    assert run_plan(replace(plan, job=job)).status == "complete"
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "complete"
    (event,) = status["events"]
    assert event["kind"] == "warning"
    assert "mlflow is given up at figures: ConnectionError: no route to host" in event["text"]
    assert "no route to host" in (tmp_path / "run" / "report.html").read_text()


def test_a_tracker_records_a_run_that_fails(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(context: Any) -> RunResult:
        raise WorkerError("no worker can start")

    tracker = Broken("nothing", None)
    monkeypatch.setattr(run, "_run_stages", stages)
    monkeypatch.setattr(run, "trackers_of", lambda job: {"mlflow": tracker})
    job = plan.job.model_copy(update={"output": str(tmp_path / "run")})
    with pytest.raises(WorkerError):
        run_plan(replace(plan, job=job))
    assert tracker.told == ["begin", "end"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Silence the verbose logging of the trackers' libraries."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
