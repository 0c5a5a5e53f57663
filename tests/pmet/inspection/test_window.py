"""The rule by which layers are recommended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmet.inspection import State, best_window, default_width, window_states

STATES = [
    *(State(part, (i,)) for part in ("hidden", "ffn", "attention") for i in range(5)),
    *(State(part, (i, i + 1)) for part in ("ffn", "attention") for i in range(4)),
]


@pytest.mark.parametrize(
    ("depth", "width"), [(2, 2), (5, 3), (6, 3), (12, 3), (28, 5), (30, 5), (48, 9)]
)
def test_the_width_follows_the_depth(depth: int, width: int) -> None:
    assert default_width(depth) == width


@given(st.lists(st.floats(-1, 1), min_size=len(STATES), max_size=len(STATES)))
def test_the_window_is_the_one_of_its_width_that_brings_back_most(effects: list[float]) -> None:
    best = best_window(STATES, effects, 2)
    assert STATES[best].part == "ffn"
    windows = [(effects[n], -s.layers[0]) for n, s in enumerate(STATES) if s in STATES[15:19]]
    # Of equal ones, the lowest.
    assert (effects[best], -STATES[best].layers[0]) == max(windows)


def test_a_window_ends_in_a_layer_with_attention() -> None:
    without = [s for s in STATES if s != State("attention", (2,))]
    assert [without[n].layers for n in window_states(without, 2)] == [(0, 1), (2, 3), (3, 4)]
    assert [without[n].layers for n in window_states(without, 1)] == [(0,), (1,), (3,), (4,)]
