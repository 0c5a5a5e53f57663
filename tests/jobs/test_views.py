"""Terminal output about a run."""

import pytest

from jobs.views import gate_text


@pytest.mark.parametrize(
    ("name", "threshold", "value", "said"),
    [
        ("efficacy", 0.9, 0.875, "efficacy is 87.5 %, the gate requires at least 90.0 %"),
        ("fluency", 5.5, 5.25, "fluency is 5.25 bits, the gate requires at least 5.50 bits"),
        (
            "specificity_drop",
            0.02,
            0.05,
            "specificity_drop is 5.0 points below, the gate requires at most 2.0 points below "
            "the base",
        ),
        (
            "perplexity_increase",
            0.02,
            0.05,
            "perplexity_increase is +5.0 %, the gate requires at most 2.0 % over the base",
        ),
    ],
)
def test_a_gate_is_described_in_words(name: str, threshold: float, value: float, said: str) -> None:
    gate = {"name": name, "threshold": threshold, "value": value, "passed": False}
    assert gate_text(gate) == said
