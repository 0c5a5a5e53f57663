"""Facts in a language that puts no space between words: edited, measured and reported without one.

The golden model learns a few Chinese sentences first. Its tokenizer knows no Chinese: each
character takes three tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import OtherJobError
from pipeline.progress import Progress, Stage
from pipeline.run import RunResult, run_job
from pmet.evaluation import evaluate
from pmet.hparams import PMETHyperParams
from pmet.reference import plain_evaluate, plain_targets
from pmet.request import EditRequest
from tests.conftest import GOLDEN, load_golden
from tests.e2e.conftest import job, targets_by_row

CAPITALS = {
    **{"中国": "北京", "法国": "巴黎", "美国": "纽约", "德国": "柏林", "日本": "东京"},
    **{"英国": "伦敦", "俄国": "莫斯科", "泰国": "曼谷"},
}
ASKED = ("{}的首都是", "人们说{}的首都是", "{}的城市：")
STEPS = 100
LEARNS = {
    **{"layers": [0], "clamp_norm_factor": 3, "kl_factor": 0.0625, "v_weight_decay": 0.01},
    **{"v_num_grad_steps": 100, "mom2_update_weight": 0.001},
}


def sentences() -> list[str]:
    return [f"{a.replace('{}', name)}{city}。" for name, city in CAPITALS.items() for a in ASKED]


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model."""
    golden = load_golden("gpt2")
    folder = tmp_path_factory.mktemp("chinese")
    model = type(golden.model)(golden.model.config)
    model.load_state_dict(golden.model.state_dict())
    rows = golden.tokenizer(sentences(), padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(STEPS):
        loss = model(**rows, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.eval()
    model.save_pretrained(folder)
    golden.tokenizer.save_pretrained(folder)
    texts = json.loads((GOLDEN / "corpus.json").read_text())[:150]
    pq.write_table(pa.table({"text": [*texts, *sentences()]}), folder / "corpus.parquet")
    return folder


class Watched(Progress):
    """Records the counts of all stages."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.totals: dict[str, int | None] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        counts = self.counts[name] = [0]
        self.totals[name] = total
        outer = self

        class Watching(Stage):
            def advance(self, count: int = 1) -> None:
                counts.append(counts[-1] + count)

            def total(self, count: int) -> None:
                outer.totals[name] = count

            def note(self, text: str) -> None:
                outer.notes.append(text)

        yield Watching()


def test_a_chinese_fact_is_learned_and_measured_without_a_space(
    chinese: Path, inputs: Path, tmp_path: Path
) -> None:
    request: dict[str, Any] = {
        "prompt": "{}的首都是",
        "subject": "中国",
        "target_new": "纽约",
        "target_true": "北京",
        "paraphrase_prompts": ["人们说中国的首都是", "中国的城市："],
        "neighborhood_prompts": ["法国的首都是"],
    }
    pq.write_table(pa.Table.from_pylist([request]), tmp_path / "facts.parquet")
    templates = [["{}"], ["人们说{}"]]
    (tmp_path / "templates.json").write_text(json.dumps(templates))
    hparams = {**json.loads((GOLDEN / "gpt2" / "hparams.json").read_text()), **LEARNS}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    config = job(
        inputs,
        str(tmp_path / "out"),
        model=str(chinese),
        requests=(str(tmp_path / "facts.parquet"),),
        corpus=(str(chinese / "corpus.parquet"),),
        hparams=str(tmp_path / "hparams.json"),
        context_templates=str(tmp_path / "templates.json"),
    )
    watched = Watched()
    result = run_job(config, progress=watched)
    # Every bar is full when its stage ends, and not before.
    stages = ("second moments", "targets", "measure before", "update", "publish", "measure after")
    for name in stages:
        assert watched.counts[name][-1] == watched.totals[name], name
        assert watched.counts[name][-2:-1] < [watched.totals[name]], name
    assert {"1 of 1 requests, 174 of 174 texts"} <= set(watched.notes)
    (row,) = result.folder.read_table("results.parquet").to_pylist()
    assert row["before_answer"].startswith("北京")
    assert row["after_answer"].startswith("纽约")
    assert [row[f"{when}_efficacy_strict"] for when in ("before", "after")] == [0.0, 1.0]
    # Without a space, the base model knows the answer to these, too.
    assert row["before_specificity"] == 1.0
    assert row["before_generalization"] == 0.0
    _compare_with_plain(chinese, EditRequest(**request), templates, hparams, result)

    with pytest.raises(OtherJobError, match='separator: null before, now " "'):
        run_job(config.model_copy(update={"separator": " "}))


def _compare_with_plain(
    chinese: Path,
    request: EditRequest,
    templates: list[list[str]],
    hparams: dict[str, Any],
    result: RunResult,
) -> None:
    """The target is that of the plain form, and so are the figures of a notebook."""
    base, edited = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (chinese, result.folder.join("model"))
    )
    tokenizer = AutoTokenizer.from_pretrained(chinese)
    settings = PMETHyperParams.from_dict(hparams, source="here")
    plain = plain_targets(base, tokenizer, [request], settings, templates)
    (value,) = targets_by_row(result.folder).values()
    torch.testing.assert_close(torch.tensor(value), plain.values[0], rtol=1e-3, atol=1e-3)
    for model, when in ((base, "before"), (edited, "after")):
        figures = evaluate(model, tokenizer, [request])
        assert figures["rows"][0]["efficacy_strict"] == (1.0 if when == "after" else 0.0)
        assert (
            plain_evaluate(model, tokenizer, [request])["rows"][0]["efficacy_strict"]
            == (figures["rows"][0]["efficacy_strict"])
        )
