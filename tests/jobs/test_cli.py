"""The command line: exit statuses, and one clear line for bad input without starting a worker."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file, save_file

import pipeline.run
from pipeline.cluster.signals import Stopped
from pipeline.errors import WorkerError
from pipeline.estimate.prediction import Estimate
from pipeline.progress import Progress
from pipeline.run_folder.lease import Holder, Lease
from pipeline.stages.context import Context
from pipeline.storage.store import Store
from tests.conftest import GOLDEN
from tests.jobs.conftest import Invoke

GPT2 = GOLDEN / "gpt2"
STOPPED = "stopped by a signal; the same job goes on from here"


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Write a valid job file with changes; ``None`` leaves a key out."""
    rows = [
        {"prompt": "{} works as", "subject": "Sur Bavov", "target_new": "a glass blower"},
        {"prompt": "no place", "subject": "Sur Bavov", "target_new": "a baker"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    texts = json.loads((GPT2.parent / "corpus.json").read_text())[:90]
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")

    def write(**changes: Any) -> Path:
        values = {
            "model": str(GPT2 / "model"),
            "requests": str(tmp_path / "requests.parquet"),
            "output": str(tmp_path / "out"),
            "hparams": str(GPT2 / "hparams.json"),
            "corpus": str(tmp_path / "corpus.parquet"),
            **changes,
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return write


def test_help_says_what_there_is(pmet: Invoke) -> None:
    status, out, _ = pmet("--help")
    assert status == 0
    for command in ("demo", "run", "statistics", "evaluate", "report"):
        assert command in out
        assert pmet(command, "--help")[0] == 0


def test_a_dry_run_shows_the_plan_and_starts_nothing(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    status, out, _ = pmet(
        "run", job(), "--dry-run", "--no-estimate", "--set", "targets.shard_size=4"
    )
    assert status == 0
    assert "estimate" not in out
    assert "shard_size: 4" in out
    assert "1 to edit, 1 rejected" in out
    assert re.search(r"shared keys +none", out)
    assert "row 1: prompt 'no place' holds 0 places" in out
    assert not ray.is_initialized()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_estimates_time_memory_and_the_effect_of_more_workers(
    pmet: Invoke, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Estimate(
        stages={"start": 10.0, "targets": 7190.0},
        worker_bytes=3 * 2**30,
        rank_bytes=2**29,
        workers=2,
        ranks=1,
        side_by_side=2,
        by_workers={1: 14400.0, 4: 3600.0},
        diverging=0.25,
    )
    monkeypatch.setattr("pipeline.estimate.estimate", lambda plan: found)
    status, out, _ = pmet("run", job(), "--dry-run")
    assert status == 0
    assert re.search(r"total +2 h 00 min", out)
    assert "3.00 GiB × 2" in out
    assert re.search(r"4 +1 h 00 min +4 h 00 min", out)
    assert re.search(r"targets that diverge +25.0 % of the sample", out)
    assert "lower v_lr or clamp_norm_factor in the hyper-parameters" in out
    # Figures that depend on the whole update are not estimated.
    assert re.search(r"‖Δ‖/‖W‖ +known after the update", out)


@pytest.mark.parametrize("section", ["targets.gpus_per_worker", "update.gpus_per_rank"])
def test_a_job_for_gpus_is_refused_on_a_machine_without(
    pmet: Invoke, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for options in (["--dry-run", "--no-estimate"], ["--dry-run"], []):
        status, _, err = pmet("run", job(), *options, "--set", f"{section}=1")
        assert status == 2
        assert f"{section}: 1, but this machine has no GPU" in err
        assert f"set {section} to 0, to compute on CPUs, or run on" in err


def test_a_dry_run_of_a_job_for_a_clusters_gpus_is_one_on_a_machine_without_too(
    pmet: Invoke, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    there = ["--dry-run", "--address", "head:6379"]
    status, out, _ = pmet("run", job(), *there, "--set", "targets.gpus_per_worker=1")
    assert status == 0
    assert "no estimate: the job needs GPUs and this machine has none" in out


def test_a_dry_run_warns_of_more_processes_than_cores_can_serve(
    pmet: Invoke, job: Callable[..., Path]
) -> None:
    many = ["--set", "targets.workers=1000", "--set", "update.ranks=1000"]
    status, out, _ = pmet("run", job(), "--dry-run", "--no-estimate", *many)
    assert status == 0
    for key, what in (("targets.workers", "workers"), ("update.ranks", "ranks")):
        assert f"warning: {key}: 1000 {what} of 1 CPU each share the" in out


def test_a_dry_run_says_how_many_requests_share_a_key(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    facts = [("{} works as", "a baker"), ("{} lives in", "Zaiter"), ("The {} is", "a baker")]
    rows = [{"prompt": p, "subject": "Sur Bavov", "target_new": t} for p, t in facts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shared.parquet")
    override = f"requests={tmp_path / 'shared.parquet'}"
    _, out, _ = pmet("run", job(), "--dry-run", "--no-estimate", "--set", override)
    assert re.search(r"shared keys +2 requests share 1 key \(targets.shared_keys: joint\)", out)


@pytest.mark.parametrize("command", ["run", "evaluate", "statistics"])
def test_a_model_with_values_that_are_not_finite_is_refused(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, command: str
) -> None:
    base, name = tmp_path / "base", "transformer.h.3.mlp.c_proj.weight"
    shutil.copytree(GPT2 / "model", base)
    weights = load_file(base / "model.safetensors")
    weights[name][0, 0] = torch.nan
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    arguments: list[object] = {
        "run": [job(model=str(base))],
        "evaluate": [base, tmp_path / "requests.parquet"],
        "statistics": [
            base,
            tmp_path / "corpus.parquet",
            "--output",
            tmp_path / "m",
            "--layers",
            0,
        ],
    }[command]
    status, _, err = pmet(command, *arguments)
    assert status == 2
    assert "holds values that are not finite: " in err
    assert f"{name} (1 " in err
    assert "Traceback" not in err
    assert not ray.is_initialized()


NO_MODEL = "/no/such/model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "unknown key modle; did you mean model?"),
        ({"targets": {"shards": 3}}, "unknown key targets.shards"),
        ({"requests": "/no/such/file.parquet"}, "/no/such/file.parquet matches no file"),
        ({"requests": str(GPT2 / "hparams.json")}, "hparams.json"),
        ({"hparams": "gpt-5"}, "name a file or a preset ("),
        ({"hparams": str(GPT2 / "requests.json")}, "expected a mapping"),
        ({"model": NO_MODEL}, f"model {NO_MODEL} is not a folder"),
        ({"model": str(GPT2)}, "has no config.json"),
        ({"corpus": None}, "neither second_moments nor a corpus"),
        ({"corpus": None, "second_moments": "/no/such"}, "there is nothing at /no/such"),
        ({"context_templates": str(GPT2 / "hparams.json")}, "context templates must be groups"),
        ({"seed": -1}, "seed: -1 is not allowed"),
        (
            {
                "gates": {"perplexity_increase": 0.1},
                "corpus": None,
                "second_moments": str(GPT2 / "second_moments.safetensors"),
            },
            "perplexity_increase needs a corpus",
        ),
    ],
)
def test_a_bad_job_is_one_clear_line_and_exit_2(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    status, out, err = pmet("run", job(**changes))
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err
    assert len([line for line in err.splitlines() if line.startswith("pmet:")]) == 1
    assert not ray.is_initialized()
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_folder_that_another_run_writes_is_a_matter_of_time_and_not_bad_input(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    with Lease.acquire(Store(tmp_path / "out")):
        status, out, err = pmet("run", job())
    assert status == 1
    assert "out is being written by another run (process" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "out" / "run.json").exists()
    assert not ray.is_initialized()


def test_a_run_that_loses_its_folder_is_exit_1_and_leaves_it_alone(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(context: Context) -> None:
        there = replace(Holder.here(60.0), host="other", machine="other")
        context.store.write_json("lease/000002.json", asdict(there))
        context.folder.record("piece", {})

    monkeypatch.setattr(pipeline.run, "_run_stages", overtaken)
    status, _, err = pmet("run", job())
    assert status == 1
    assert "was taken over by process" in err
    assert "on other" in err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "running"
    assert not (tmp_path / "out" / "records").exists()


def test_a_run_that_fails_gives_its_folder_back(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Context) -> None:
        raise WorkerError("no worker can start")

    monkeypatch.setattr(pipeline.run, "_run_stages", broken)
    assert pmet("run", job())[0] == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    Lease.acquire(Store(tmp_path / "out")).release()


@pytest.mark.parametrize("where", ["dump_job", "trackers_of", "_run_stages", "_tell_end"])
@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (KeyboardInterrupt, ("stopped", STOPPED, 130)),
        (partial(Stopped, signal.SIGTERM), ("stopped", STOPPED, 143)),
        (partial(WorkerError, "no worker"), ("failed", "no worker", 1)),
        (partial(OSError, 5, "Input/output error"), ("failed", "[Errno 5] Input/output error", 1)),
    ],
)
def test_wherever_a_run_is_cut_short_its_folder_says_how_it_ended(
    pmet: Invoke,
    job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Callable[[], BaseException],
    ended: tuple[str, str, int],
) -> None:
    def broken(*_: Any) -> None:
        raise error()

    monkeypatch.setattr(pipeline.run, "_run_stages", lambda _: None)
    monkeypatch.setattr(pipeline.run, where, broken)
    status, out, err = pmet("run", job())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["status"], record["error"], record["exit_status"]) == ended
    assert status == ended[2]
    assert "Traceback" not in out + err
    Lease.acquire(Store(tmp_path / "out")).release()


def test_a_disk_that_is_full_while_a_run_fails_leaves_the_first_error(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def broken(_: Context) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        raise WorkerError("no worker can start")

    monkeypatch.setattr(pipeline.run, "_run_stages", broken)
    monkeypatch.setattr("jobs.streams.finish", lambda: None)
    try:
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("jobs.failure.err.print", lambda text, **_: said.append(text))
            patch.setattr("pipeline.progress.RichProgress", lambda _: Progress())
            status, _, _ = pmet("run", job())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, said) == (1, ["pmet: no worker can start"])


def test_a_traceback_is_shown_where_it_is_asked_for(
    pmet: Invoke, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMET_TRACEBACK", "1")
    monkeypatch.setattr(pipeline.run, "_run_stages", lambda _: 1 / 0)
    status, _, err = pmet("run", job())
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith(
        "pmet: `pmet run` failed unexpectedly: ZeroDivisionError"
    )
    assert "PMET_TRACEBACK=1" in pmet("--help")[1]


def test_a_storage_without_conditional_writes_is_warned_of(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Context) -> None:
        raise WorkerError("enough")

    monkeypatch.setattr(Store, "creates_exclusively", False)
    monkeypatch.setattr(pipeline.run, "_run_stages", broken)
    _, _, err = pmet("run", job())
    assert "warning: " in err
    (event,) = json.loads((tmp_path / "out" / "run.json").read_text())["events"]
    assert event["kind"] == "warning"
    assert "start one at a time" in event["text"]


def test_bad_tables_are_named(pmet: Invoke, job: Callable[..., Path], tmp_path: Path) -> None:
    path = job()
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"prompt": ["{} is"], "subject": ["x"]}), bad)
    status, _, err = pmet("run", path, "--set", f"requests={bad}")
    assert (status, "has no column target_new" in err) == (2, True)
    bad.write_bytes((tmp_path / "requests.parquet").read_bytes()[:-30])
    status, _, err = pmet("run", path, "--set", f"requests={bad}")
    assert (status, str(bad) in err) == (2, True)
    pq.write_table(pa.table({"prompt": ["x"], "subject": ["x"], "target_new": ["y"]}), bad)
    status, _, err = pmet("run", path, "--set", f"requests={bad}")
    assert (status, "none of 1 requests can be edited" in err) == (2, True)
    pq.write_table(pa.table({"words": ["x"]}), bad)
    status, _, err = pmet("run", path, "--set", f"corpus={bad}")
    assert (status, "has no column text" in err) == (2, True)


def test_a_missing_job_file_and_wrong_usage_are_exit_2(pmet: Invoke, tmp_path: Path) -> None:
    status, _, err = pmet("run", tmp_path / "none.yaml")
    assert (status, "none.yaml" in err) == (2, True)
    assert pmet("run")[0] == 2
    assert pmet("no-such-command")[0] == 2
    assert pmet("run", "x.yaml", "--no-such-option")[0] == 2


def test_evaluate_measures_a_model(
    pmet: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((GOLDEN / "facts.json").read_text())[:20]
    rows = [{k: f[k] for k in ("prompt", "subject", "target_new", "target_true")} for f in facts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "facts.parquet")
    figures = tmp_path / "figures.json"
    # The shell does not expand a tilde in quotes or after an equals sign.
    (tmp_path / "model").symlink_to(GPT2 / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, _ = pmet(
        *("evaluate", "~/model", "~/facts.parquet", "--sample", 12, "--output=~/figures.json")
    )
    assert status == 0
    assert "12 requests" in out
    measured = json.loads(figures.read_text())
    assert measured["counts"] == {"measured": 12, "rejected": 0}
    assert measured["efficacy"] < 0.2
    assert measured["generalization"] is None
    status, _, err = pmet("evaluate", NO_MODEL, tmp_path / "facts.parquet")
    assert (status, "is not a folder" in err) == (2, True)


def test_evaluate_compares_with_what_the_base_says(pmet: Invoke, tmp_path: Path) -> None:
    facts = json.loads((GOLDEN / "facts.json").read_text())[:6]
    rows = [{k: f[k] for k in ("prompt", "subject", "target_new", "target_true")} for f in facts]
    texts = [f["prompt"].replace("{}", f["subject"]) for f in facts]
    rows = [row | {"neighborhood_prompts": texts[i : i + 2]} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "facts.parquet")
    command = ("evaluate", GPT2 / "model", tmp_path / "facts.parquet", "--output")
    status, out, _ = pmet(*command, tmp_path / "same.json", "--base", GPT2 / "model")
    assert status == 0
    same = json.loads((tmp_path / "same.json").read_text())
    assert (same["locality"], same["locality_unrelated"]) == (1.0, 1.0)
    assert "in its own words" in out
    assert same["intervals"]["locality"][1] == 1.0
    assert pmet(*command, tmp_path / "none.json", "--answers", 0)[0] == 0
    none = json.loads((tmp_path / "none.json").read_text())
    assert (none["efficacy_said"], none["locality"]) == (None, None)
    status, _, err = pmet(*command, tmp_path / "bad.json", "--answers", "many")
    assert (status, "--answers: 'many' is neither auto nor" in err) == (2, True)


def test_a_report_needs_a_run(pmet: Invoke, tmp_path: Path) -> None:
    status, _, err = pmet("report", tmp_path)
    assert (status, "holds no finished run" in err) == (2, True)


def test_an_output_that_overlaps_with_what_is_read_is_refused(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(GPT2 / "model", tmp_path / "x" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for changes, said in (
        ({"model": str(tmp_path / "x" / "model"), "output": str(tmp_path / "x")}, "model: "),
        ({"model": f"file://{tmp_path}/link/model", "output": str(tmp_path / "x")}, "model: "),
        ({"output": str(tmp_path)}, "requests: "),
        ({"hparams": str(tmp_path / "out" / "h.json")}, "hparams: "),
        ({"targets": {"store": str(tmp_path / "out")}}, "targets.store: "),
        ({"evaluate": {"last": str(tmp_path / "out")}}, "evaluate.last: "),
        ({"second_moments": str(tmp_path / "out" / "m")}, "second_moments: "),
        ({"context_templates": str(tmp_path / "out" / "t.json")}, "context_templates: "),
    ):
        for options in (("--dry-run", "--no-estimate"), (), ("--fresh",)):
            status, _, err = pmet("run", job(**changes), *options)
            assert status == 2, changes
            assert f"pmet: {said}" in err or f"\n{said}" in err
            assert "name another output" in err
    inside = {
        "model": str(tmp_path / "x" / "model"),
        "evaluate": {"store": f"{tmp_path}/x/model/m"},
    }
    status, _, err = pmet("run", job(**inside))
    assert (status, "evaluate.store: " in err, "lies inside the model" in err) == (2, True, True)


def test_a_folder_with_files_that_is_no_run_is_refused(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "mine.txt").write_text("mine")
    for options in (("--dry-run", "--no-estimate"), (), ("--fresh",)):
        status, _, err = pmet("run", job(), *options)
        assert (status, "out holds model and is not a run folder" in err) == (2, True)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["model", "mine.txt"]


def test_where_no_row_can_be_edited_the_reasons_are_kept(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": "no place", "subject": "A", "target_new": "b", "note": "x"}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    status, _, err = pmet("run", job(), "--dry-run", "--no-estimate")
    assert (status, "none of 2 requests can be edited" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    status, _, err = pmet("run", job())
    assert (status, "out/rejected.parquet has the reason of each" in err) == (2, True)
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert [(row["row"], row["note"]) for row in rejected] == [(0, "x"), (1, "x")]
    status_of_run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (status_of_run["status"], status_of_run["exit_status"]) == ("failed", 2)
    # A job with corrected requests may use the folder.
    good = [{"prompt": "{} is", "subject": "A", "target_new": "b"}]
    pq.write_table(pa.Table.from_pylist(good), tmp_path / "requests.parquet")
    assert pmet("run", job(), "--dry-run", "--no-estimate")[0] == 0


def test_another_job_in_the_folder_is_refused_by_the_keys_that_changed(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(run: Context) -> Any:
        raise WorkerError("stopped here")

    monkeypatch.setattr(pipeline.run, "_run_stages", stopped)
    serial = {"targets": {"workers": 0}, "update": {"ranks": 0}}
    assert pmet("run", job(**serial))[0] == 1
    changed = job(**serial | {"targets": {"workers": 0, "shard_size": 32}, "seed": 1})
    status, _, err = pmet("run", changed)
    assert status == 2
    assert (
        'another job: job (seed: 0 before, now 1, targets.shard_size: "auto" before, now 32) '
        "changed; name another output, or start over with --fresh" in err
    )


def test_figures_are_not_written_over_files_of_the_users(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    job()
    requests, mine = tmp_path / "requests.parquet", tmp_path / "mine.json"
    mine.write_text('{"mine": 1}')
    for output, said in (
        (mine, "mine.json already exists and was not written by this command"),
        (requests, "requests.parquet is the --output"),
        (GPT2 / "model" / "figures.json", "holds the --output"),
    ):
        status, _, err = pmet("evaluate", GPT2 / "model", requests, "--output", output)
        assert (status, said in err) == (2, True), err
    assert mine.read_text() == '{"mine": 1}'
    for _ in range(2):
        assert pmet("evaluate", GPT2 / "model", requests, "--output", tmp_path / "f.json")[0] == 0


def test_second_moments_are_not_written_into_a_model_or_a_corpus(
    pmet: Invoke, job: Callable[..., Path], tmp_path: Path
) -> None:
    job()
    corpus = tmp_path / "corpus.parquet"
    for output, text in ((GPT2 / "model", corpus), (tmp_path, corpus), (tmp_path / "s", tmp_path)):
        status, _, err = pmet("statistics", GPT2 / "model", text, "--output", output, "--layers", 3)
        assert (status, "could be overwritten or deleted" in err) == (2, True), err


def test_the_demo_takes_no_folder_of_the_users(pmet: Invoke, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "requests.parquet").write_text("mine")
    status, _, err = pmet("demo", "--output", tmp_path)
    assert (status, "holds inputs and is not a run folder" in err) == (2, True)
    assert (tmp_path / "inputs" / "requests.parquet").read_text() == "mine"


def test_evaluate_asks_as_the_separator_says(pmet: Invoke, tmp_path: Path) -> None:
    rows = json.loads((GOLDEN / "facts.json").read_text())[:12]
    facts = [{"prompt": r["prompt"], "subject": r["subject"]} for r in rows]
    for fact, row in zip(facts, rows, strict=True):
        fact["target_new"] = row["target_true"]
    pq.write_table(pa.Table.from_pylist(facts), tmp_path / "facts.parquet")
    known = []
    for options in ((), ("--separator", " "), ("--separator", "")):
        output = tmp_path / "figures.json"
        command = ("evaluate", GPT2 / "model", tmp_path / "facts.parquet", "--output", output)
        assert pmet(*command, *options)[0] == 0
        known.append(json.loads(output.read_text())["efficacy_strict"])
    assert known[0] == known[1] > 0.5 > known[2]
