"""A job on real facts reaches the published implementation's scores."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.job.config import JobConfig, TargetsConfig, UpdateConfig
from pipeline.run import run_job

# The README beside the data: the published implementation after the first 200 edits, in per cent.
PUBLISHED = {
    "before": {
        "efficacy": 0.0,
        "efficacy_strict": 0.0,
        "generalization": 0.3,
        "generalization_strict": 0.0,
        "specificity": 100.0,
        "specificity_strict": 99.4,
    },
    "after": {
        "efficacy": 81.5,
        "efficacy_strict": 74.0,
        "generalization": 82.8,
        "generalization_strict": 73.5,
        "specificity": 86.1,
        "specificity_strict": 59.2,
    },
}


@pytest.mark.slow
def test_every_score_is_within_one_point_of_the_published_one(
    counterfact_folder: Path, tmp_path: Path
) -> None:
    facts = tmp_path / "facts.parquet"
    pq.write_table(pq.read_table(counterfact_folder / "facts.parquet").slice(0, 200), facts)
    result = run_job(
        JobConfig(
            model=str(counterfact_folder / "model"),
            requests=(str(facts),),
            output=str(tmp_path / "out"),
            hparams=str(counterfact_folder / "hparams.json"),
            corpus=(str(counterfact_folder / "corpus.parquet"),),
            context_templates=str(counterfact_folder / "context_templates.json"),
            # Those of its corpus, which `tests.pipeline.second_moments.test_collection` computes.
            second_moments=str(counterfact_folder / "second_moments.safetensors"),
            targets=TargetsConfig(workers=0),
            update=UpdateConfig(ranks=0),
        )
    )
    assert result.metrics["counts"] == {"requested": 200, "rejected": 0, "edited": 200}
    for when, figures in PUBLISHED.items():
        for name, published in figures.items():
            assert abs(100 * result.metrics[when][name] - published) <= 1, (when, name)
