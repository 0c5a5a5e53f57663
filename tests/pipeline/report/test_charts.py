"""Charts draw finite values, and skip others without a warning."""

import logging
import math

import pytest

from pipeline.report.charts import line_chart, score_chart


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


def test_a_line_has_a_band_where_there_is_an_interval() -> None:
    lines = {"<b>FFN": [(3, 0.25, (0.1, 0.4)), (4, 0.5, (0.4, 0.6))]}
    drawn = line_chart("a", "Effects", lines, "effect", marked=(3, 4))
    assert "&lt;b&gt;FFN" in drawn
    assert "<b>" not in drawn
    plain = line_chart("a", "Effects", {"FFN": [(3, 0.25, None)]}, "effect", percent=False)
    assert "%" in drawn
    assert "%" not in plain
    assert 'aria-label="Effects"' in plain
