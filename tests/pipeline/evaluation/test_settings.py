"""Figures that cannot be measured are refused before any worker starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import JobError
from pipeline.evaluation.settings import How, Last, check_evaluation, read_last
from pipeline.job.config import EvaluateConfig, JobConfig
from pipeline.storage.store import Store

COLUMNS = ["prompt", "subject", "target_new"]
MUTE = SimpleNamespace(chat_template=None)


def check(columns: list[str] = COLUMNS, *, corpus: bool = True, **settings: Any) -> Any:
    job = JobConfig.model_validate(
        {"model": "m", "requests": ("r",), "output": "o", "hparams": "h", **settings}
    )
    return check_evaluation(job, MUTE, columns, corpus=corpus)


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({"gates": {"perplexity_increase": 0.1}}, "perplexity_increase needs a corpus to measure"),
        ({"gates": {"agreement": 0.9}}, "gates.agreement needs a corpus to measure agreement on"),
        ({"gates": {"agreement_drop_since_last": 0.1}}, "drop_since_last needs a corpus"),
        ({"gates": {"fluency_drop": 0.1}}, "gates.fluency_drop needs text that the model writes; "),
        (
            {"gates": {"consistency": 0.1}, "evaluate": {"fluency": True}},
            "gates.consistency needs a column reference_texts, which the requests do not have",
        ),
        ({"gates": {"portability_strict": 0.1}}, "needs a column portability_prompts, which"),
        ({"evaluate": {"group_by": "colour"}}, "evaluate.group_by: the requests have no column"),
        ({"evaluate": {"chat_template": True}}, "evaluate.chat_template: the model's tokenizer "),
        (
            {"gates": {"locality": 0.9}, "evaluate": {"answers": 0}},
            "gates.locality needs answers in the model's own words; set evaluate.answers to",
        ),
        ({"gates": {"chat_said": 0.5}}, "gates.chat_said needs a chat template, which the model's"),
        ({"evaluate": {"questions": "/nowhere.yaml"}}, "/nowhere.yaml"),
        ({"evaluate": {"last": "/nowhere/run"}}, "evaluate.last: /nowhere/run has no figures to"),
    ],
)
def test_what_a_job_lacks_is_named(settings: dict[str, Any], lacks: str) -> None:
    with pytest.raises(JobError) as error:
        check(corpus=False, **settings)
    assert lacks in str(error.value)


def test_what_is_there_is_taken(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_json("metrics.json", {"after": {"efficacy": 1, "score": None}})
    gates = {"agreement": 0.5, "consistency_drop": 0.1, "portability": 0.2}
    found = check(
        [*COLUMNS, "relation", "reference_texts", "portability_prompts"],
        gates=gates,
        evaluate={"fluency": True, "last": str(tmp_path)},
    )
    assert found.group_by == "relation"
    assert found.last == Last(str(tmp_path), {"efficacy": 1.0, "score": None})
    assert (check().group_by, check().last) == (None, None)


@pytest.mark.parametrize("text", [b"[]", b'{"before": {}}', b'{"after": {"efficacy": "x"}}', b"{"])
def test_what_is_no_metrics_file_is_refused(tmp_path: Path, text: bytes) -> None:
    Store(str(tmp_path)).write_bytes("metrics.json", text)
    with pytest.raises(JobError, match=r"evaluate.last: .* name the output of a finished run"):
        read_last(str(tmp_path))


def test_a_model_writes_under_the_jobs_seed_where_that_is_asked() -> None:
    assert How.of(EvaluateConfig(fluency=True), 7) == How(writing_seed=7)
    assert How.of(EvaluateConfig(chat_template=True), 7) == How(chat_template=True)
