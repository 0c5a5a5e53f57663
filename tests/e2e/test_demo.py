"""`pmet demo` does what it says."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from jobs.demo.show import run_demo


@pytest.mark.slow
def test_the_demo_changes_two_hundred_facts(local_ray: None, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    result = run_demo(tmp_path / "demo", console)
    after = result.metrics["after"]
    assert result.metrics["counts"] == {"requested": 200, "rejected": 0, "edited": 200}
    assert result.metrics["before"]["efficacy"] == 0
    assert after["efficacy"] >= 0.95
    assert after["generalization"] >= 0.85
    assert after["specificity"] >= 0.90
    said = console.file.getvalue()
    for part in ("What the model says", "before", "after", "efficacy", "report.html"):
        assert part in said
    assert pq.read_table(tmp_path / "demo" / "results.parquet").num_rows == 200
    AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "model")
