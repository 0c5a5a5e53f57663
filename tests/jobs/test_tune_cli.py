"""The arguments of ``pmet tune``."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.tune_cli import _seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("20m", 1200.0), ("1.5h", 5400.0), ("0.5s", 0.5)]
)
def test_a_budget_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["20", "m", "0m", "-5m", "20 m", "1d", "inf", "1e3s"])
def test_other_budgets_are_refused(text: str) -> None:
    result = CliRunner().invoke(app, ["tune", "job.yaml", "--output", "out", "--budget", text])
    assert result.exit_code == 2
