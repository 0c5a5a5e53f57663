"""A whole search on a small model: killed, resumed, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from jobs.tune import tuning
from jobs.tune.search import Score
from jobs.tune.space import Rung, Setting, changed, rungs
from jobs.tune.trials import Trials
from jobs.tune.tuning import PAGE, Settings, _fitting, tune
from jobs.tune.views import hparams_text
from pipeline.errors import JobError
from pipeline.hyper_parameters import TUNED, TUNING
from pipeline.job import JobConfig, load_job
from pipeline.plan import make_plan
from pmet import PMETHyperParams
from tests.conftest import GOLDEN, ROOT
from tests.e2e.conftest import HERE, facts, wait_until

BUDGET = 1000
START = Setting(layers=(0,), mom2_update_weight=1000)


def two_rungs(layers: Sequence[Sequence[int]], *, chat: bool) -> list[Rung]:
    """A search that ends by itself, however fast the machine is."""
    first, _, size, *_ = rungs(layers)

    def vary(setting: Setting) -> list[Setting]:
        return [changed(setting, clamp_norm_factor=clamp) for clamp in (1.5, 4.0)]

    return [first, dataclasses.replace(size, vary=vary, said=True)]


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job on the golden GPT-2, with a ball too small to learn anything."""
    folder = tmp_path_factory.mktemp("tune")
    golden = GOLDEN / "gpt2"
    hparams = json.loads((golden / "hparams.json").read_text())
    (folder / "start.json").write_text(json.dumps(hparams | {"clamp_norm_factor": 0.1}))
    rows = facts()
    rows[0]["note"] = "<script>alert(1)</script>"
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")
    job = {
        "model": str(golden / "model"),
        "requests": str(folder / "requests.parquet"),
        "output": str(folder / "unused"),
        "hparams": str(folder / "start.json"),
        "corpus": str(folder / "corpus.parquet"),
        "context_templates": str(golden / "context_templates.json"),
        **HERE,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


@pytest.fixture
def job(job_file: Path) -> JobConfig:
    return load_job(job_file)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_finds_a_better_setting(
    job_file: Path, job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    settings = Settings(str(output), BUDGET, trial=8, judged=12, most_perplexity=1.0)
    arguments = ["--trial-facts", "8", "--judged-facts", "12", "--most-perplexity", "1"]
    command = ["tune", str(job_file), "--output", str(output), "--budget", f"{BUDGET}s"]
    with subprocess.Popen([sys.executable, "-m", "jobs", *command, *arguments], cwd=ROOT) as killed:
        wait_until(
            lambda: len(list(output.glob("trials/*/trial.json"))) >= 2, within_s=200, every_s=0.1
        )
        killed.send_signal(signal.SIGKILL)
    before = {file: file.stat().st_mtime_ns for file in output.glob("trials/*/trial.json")}
    assert not (output / TUNED).exists()

    monkeypatch.setattr(tuning, "rungs", two_rungs)
    record = tune(job, settings).record
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert record["facts"] == {"trial": 8, "judged": 12}
    tried = [trial["score"]["value"] for trial in record["trials"]]
    assert len(tried) >= len(before)
    assert max(tried) > 0
    judged = record["judged"]
    assert record["best"]["clamp_norm_factor"] > 0.1
    assert judged["best"]["value"] > judged["start"]["value"]
    assert judged["interval"][0] <= judged["difference"] <= judged["interval"][1]

    found = PMETHyperParams.from_file(output / TUNED)
    assert found.clamp_norm_factor == record["best"]["clamp_norm_factor"]
    assert record["about"]["model"] in (output / TUNED).read_text()
    page = (output / PAGE).read_text()
    assert "on 8 facts; judged on" in " ".join(page.split())
    assert 'aria-label="Score of each trial"' in page
    assert "<script>alert" not in page
    # A job takes it if it names the second moments beside it, and no other model's job does.
    automatic = {"hparams": "auto", "second_moments": str(output / "second_moments")}
    plan = make_plan(job.model_copy(update=automatic | {"output": str(tmp_path / "run")}))
    assert plan.hparams == found
    assert plan.origins["hyper-parameters"].endswith("hparams.yaml, found by pmet tune")
    # No trial leaves weights behind, and none met the facts that the result is judged on.
    assert not list(output.glob("trials/*/run/model/*"))
    assert not list(output.glob("trials/*/run/delta/*"))
    asked: dict[bool, set[str]] = {True: set(), False: set()}
    for file in output.glob("trials/*/requests.parquet"):
        of_judged = file.parent.name.startswith("judged")
        asked[of_judged] |= set(pq.read_table(file).column("subject").to_pylist())
    assert asked[True]
    assert not asked[True] & asked[False]

    # The same search again computes nothing.
    monkeypatch.setattr(Trials, "_result", None)
    again = tune(job, settings).record
    assert (again["best"], again["judged"]) == (record["best"], record["judged"])
    with pytest.raises(JobError, match="facts, seed changed; name another folder"):
        tune(job.model_copy(update={"seed": 3}), settings)


def test_a_folder_of_the_user_is_not_taken(job: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match="holds files, but no search; name a folder that is empty"):
        tune(job, Settings(str(tmp_path), BUDGET))
    (tmp_path / "notes.txt").rename(tmp_path / TUNING)
    (tmp_path / TUNING).write_text("[1]")
    with pytest.raises(JobError, match=r"tune\.json was not written by pmet tune"):
        tune(job, Settings(str(tmp_path), BUDGET))
    assert [file.name for file in tmp_path.iterdir()] == [TUNING]


def test_too_few_facts_are_refused(job: JobConfig, tmp_path: Path) -> None:
    settings = Settings(str(tmp_path / "out"), BUDGET, trial=2)
    with pytest.raises(JobError, match="2 facts to try settings on and 20 to judge them on are"):
        tune(job, settings)
    with pytest.raises(JobError, match="0 facts to try settings on and 40 to judge"):
        tune(job, dataclasses.replace(settings, trial=None, judged=40))
    assert not (tmp_path / "out").exists()


def test_chat_needs_a_chat_template(job: JobConfig, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"--chat: .* has no chat template; leave the option out"):
        tune(job, Settings(str(tmp_path / "out"), BUDGET, chat=True))


def only_contexts(layers: Sequence[Sequence[int]], *, chat: bool) -> list[Rung]:
    return [dataclasses.replace(rungs(layers, chat=chat)[-2], part=1.0)]


@pytest.mark.slow
def test_contexts_in_chat_are_found_where_the_model_is_asked_in_chat(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}They say: {{ m.content }} Answer:{% endfor %}"
    tokenizer.save_pretrained(model)
    learns = {"model": str(model), "hparams": str(GOLDEN / "gpt2" / "hparams.json")}
    monkeypatch.setattr(tuning, "rungs", only_contexts)
    settings = Settings(str(tmp_path / "out"), BUDGET, trial=8, judged=8, chat=True)
    record = tune(job.model_copy(update=learns), settings).record
    scores = {t["setting"]["contexts"]: t["score"] for t in record["trials"]}
    assert scores.keys() == {"completion", "chat", "both"}
    assert all(score["figures"]["chat_said"] is not None for score in scores.values())
    # What targets were optimised in made a difference.
    assert len({json.dumps(score["figures"]) for score in scores.values()}) > 1
    found = record["best"]["contexts"]
    assert scores[found]["value"] == max(score["value"] for score in scores.values())
    text = (tmp_path / "out" / TUNED).read_text()
    assert (f"contexts: {found}" in text) == (found != "completion")
    assert "contexts" not in yaml.safe_load(text)
    kept = {file.name for file in (tmp_path / "out").glob("context_templates_*.json")}
    assert kept == {f"context_templates_{kind}.json" for kind in scores}


def test_a_search_takes_as_many_facts_as_its_time_is_enough_for() -> None:
    asked: list[int] = []

    class Slow:
        def run(self, _rung: str, _setting: object, places: Sequence[int], *, quick: bool):
            asked.append(len(places))
            return Score(0.0), 2.0 * len(places), []

    def fitting(budget_s: float, facts: int) -> int:
        return _fitting(cast(Trials, Slow()), START, range(facts), budget_s)

    # Ten trials of 60 facts take 1,200 s at 2 s a fact.
    assert fitting(1200, 100) == 60
    assert fitting(12000, 100) == 600
    assert fitting(10, 100) == fitting(10, 5) == 8
    assert asked == [8, 8, 8, 5]


def test_the_file_says_what_it_rests_on() -> None:
    record = {
        "about": {"model": "0123"},
        "facts": {"trial": 30, "judged": 40},
        "seconds": 61.4,
        "judged": {
            "start": {"value": 0.25},
            "best": {"value": 0.5},
            "interval": [0.1, 0.4],
        },
        "best": {"contexts": "both"},
    }
    text = hparams_text({"layers": [1, 2], "v_lr": 0.5}, record)
    assert yaml.safe_load(text) == {"layers": [1, 2], "v_lr": 0.5}
    assert "tried on 30 facts, for 61 s" in text
    assert "On 40 other facts it scores 0.500, and the start 0.250" in text
    assert "# For jobs with contexts: both\n" in text
