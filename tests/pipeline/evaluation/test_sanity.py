"""Warnings about an edit, apart from its scores, with names and remedies."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.evaluation.sanity import warnings_of_layers, warnings_of_targets, weights_of


def layer(share: float, rounding: float = 0.01) -> dict[str, Any]:
    return {"parameter": "h.3.w", "share": share, "rounding": rounding, "dtype": "bfloat16"}


def test_a_layer_that_is_as_it_should_be_is_not_warned_of() -> None:
    assert warnings_of_layers([layer(10.0), layer(0.0, 0.5)]) == []


@pytest.mark.parametrize(
    ("share", "shown"), [(12.3, "12.3"), (math.inf, "∞"), (math.nan, "undefined")]
)
def test_a_layer_that_changes_too_much_is_named(share: float, shown: str) -> None:
    assert warnings_of_layers([layer(share)]) == [
        f"h.3.w: ‖Δ‖/‖W‖ is {shown}, above 10: the edit outweighs the model; lower "
        "clamp_norm_factor or v_lr, or raise mom2_update_weight"
    ]


def test_a_layer_whose_change_is_rounded_off_is_named() -> None:
    assert warnings_of_layers([layer(0.001, 0.914)]) == [
        "h.3.w: bfloat16 rounds off 91 % of Δ, above 50 %: store the model in a wider dtype"
    ]


def test_layers_of_older_releases_may_lack_what_is_asked() -> None:
    assert warnings_of_layers([{"parameter": "h.3.w", "share": 0.1}]) == []


def test_targets_that_ended_far_above_their_start_are_named_worst_first() -> None:
    fine = [(row, 5.0, 5.9) for row in range(10)] + [(10, None, 3.0), (11, 2.0, math.nan)]
    wild = [(20 + i, 2.0, 10.0 + i) for i in range(7)]
    assert warnings_of_targets(fine) == []
    assert warnings_of_targets(fine + wild) == [
        "7 of 19 targets ended with a loss more than 1 above the first one (row 26 from 2 to 16, "
        "row 25 from 2 to 15, row 24 from 2 to 14, row 23 from 2 to 13, row 22 from 2 to 12 and 2 "
        "more): the optimisation diverged; lower v_lr or clamp_norm_factor"
    ]


def test_the_worst_layer_is_what_a_gate_looks_at() -> None:
    assert weights_of([]) == {"change": None, "rounding": None}
    assert weights_of([layer(0.1, 0.2), layer(0.3, 0.1)]) == {"change": 0.3, "rounding": 0.2}
    undefined = weights_of([layer(0.1, math.nan), layer(math.inf, 0.1), layer(0.2, 0.9)])
    assert undefined["change"] == math.inf
    assert undefined["rounding"] is not None
    assert math.isnan(undefined["rounding"])
