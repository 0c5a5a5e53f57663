"""Exports of real runs: what is exact, and what is measured again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.edits.saved import opened_edit
from pipeline.errors import RunFolderError
from pipeline.export.exporting import export_run
from pipeline.export.factors import Target, factor
from pipeline.export.scores import measure_again
from pipeline.progress import Progress
from pipeline.run_folder.record import read_finished
from pmet import EditRequest
from pmet.evaluation.metrics import evaluate
from tests.e2e.conftest import GOOD_ROWS, Runner
from tests.saved_edits import base


def test_the_whole_edit_measured_again_has_the_runs_own_figures(
    run: Runner, tmp_path: Path
) -> None:
    found = read_finished(run("gpt2").folder)
    with opened_edit(found.store.url) as edit:
        targets = {name: Target(name.removesuffix(".weight"), True) for name in edit.weights}
        weights = factor(edit, targets, tmp_path, rank=None, energy=None, progress=Progress())
        assert [weight.full_rank for weight in weights] == [GOOD_ROWS] * 3
        scores = measure_again(found, weights, Progress())
    assert scores.figures.keys() == found.after.keys()
    for name, value in found.after.items():
        own = scores.figures[name]
        assert own is value if value is None else own == pytest.approx(value, rel=1e-5), name
    for name, ends in found.metrics["intervals"]["after"].items():
        assert scores.intervals[name] == pytest.approx(ends, rel=1e-5), name


def test_a_truncated_adapter_has_the_scores_that_peft_gives_it(run: Runner, tmp_path: Path) -> None:
    found = read_finished(run("gpt2").folder)
    output = tmp_path / "adapter"
    record = export_run(found.store.url, str(output), kind="adapter", rank=3).record
    assert json.loads((output / "export.json").read_text()) == record
    ours, theirs = record["scores"]["adapter"], record["scores"]["run"]
    assert theirs == found.after
    assert ours["efficacy_strict"] < theirs["efficacy_strict"]
    assert record["change"]["efficacy_strict"] == pytest.approx(
        ours["efficacy_strict"] - theirs["efficacy_strict"]
    )
    assert record["measured_on"] == "cpu, float32"
    plain = AutoModelForCausalLM.from_pretrained(base("gpt2"), dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, output).merge_and_unload().eval()
    fields = ("prompt", "subject", "target_new", "target_true")
    lists = ("paraphrase_prompts", "neighborhood_prompts")
    requests = [
        EditRequest(**{n: row[n] for n in fields}, **{n: tuple(row[n]) for n in lists})
        for row in pq.read_table(found.store.join("results.parquet")).to_pylist()
    ]
    again = evaluate(model, AutoTokenizer.from_pretrained(base("gpt2")), requests)
    for name in ("efficacy", "generalization", "specificity", "efficacy_strict", "score"):
        assert again[name] == pytest.approx(ours[name], abs=1e-9), name
    card = (output / "README.md").read_text()
    assert "Its scores were measured on it (on cpu, float32)" in card
    assert "| figure | before | run | adapter | 95 % interval | adapter − run |" in card


def test_what_is_measured_on_must_be_what_the_run_had(
    run: Runner, tmp_path: Path, inputs: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run("gpt2").folder.url, folder)
    settings = yaml.safe_load((folder / "job.yaml").read_text())

    def refused() -> str:
        with pytest.raises(RunFolderError) as caught:
            export_run(str(folder), str(tmp_path / "out"), kind="adapter", rank=3)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    for name, text in (
        (str(inputs / "requests.parquet"), "has no column text"),
        (str(tmp_path / "gone.parquet"), "gone.parquet"),
    ):
        (folder / "job.yaml").write_text(yaml.safe_dump(settings | {"corpus": name}))
        message = refused()
        assert message.startswith("the scores of the truncated edit cannot be measured: ")
        assert text in message
        assert message.endswith(
            "; bring back what is missing, export without --rank and --energy, or give --no-measure"
        )
    few = pq.read_table(inputs / "corpus.parquet").slice(1)
    pq.write_table(few, tmp_path / "other.parquet")
    other = settings | {"corpus": str(tmp_path / "other.parquet")}
    (folder / "job.yaml").write_text(yaml.safe_dump(other))
    assert "other.parquet has changed since the run" in refused()
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    (folder / "records" / "measured-before.json").unlink()
    assert "measured-before.json, the base model's answers, is missing" in refused()
    # Neither an exact adapter nor one that is not measured needs them.
    output = str(tmp_path / "out")
    record = export_run(str(folder), output, kind="adapter", rank=3, measure=False).record
    assert (record["exact"], record["scores"]["adapter"]) == (False, None)
    assert export_run(str(folder), str(tmp_path / "all"), kind="adapter").record["exact"]
