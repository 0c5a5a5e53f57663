"""Charts draw finite values, and skip others without a warning."""

import logging
import math

import pytest

from pipeline.report.charts import score_chart


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None])
def test_a_figure_without_a_place_on_the_axis_is_left_out(
    caplog: pytest.LogCaptureFixture, odd: float | None
) -> None:
    with caplog.at_level(logging.WARNING):
        drawn = score_chart({"efficacy": odd, "score": 0.25}, {"efficacy": 0.5, "score": odd}, {})
    assert not caplog.records
    assert "25.0%" in drawn
    assert "50.0%" in drawn
    assert "nan" not in drawn.lower()
    assert "inf" not in drawn.lower()
