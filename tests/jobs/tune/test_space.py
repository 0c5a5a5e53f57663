"""The settings that a search tries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.tune.space import (
    CLAMPS,
    DECAYS,
    KL_FACTORS,
    RATES,
    Setting,
    rungs,
    start_for,
    windows,
    written,
)
from pmet import PMETHyperParams

START = Setting(layers=(4, 5, 6, 7, 8), mom2_update_weight=6000)


@given(
    st.integers(2, 96).flatmap(
        lambda depth: st.tuples(st.just(depth), st.integers(0, depth - 1), st.integers(1, 5))
    ),
    st.integers(1, 20),
)
def test_windows_are_neighboring_layers_of_the_model_around_the_start(
    model: tuple[int, int, int], most: int
) -> None:
    depth, first, length = model
    start = tuple(range(first, min(depth, first + length)))
    found = windows(start, depth, most)
    assert found[0] == start
    assert len(set(found)) == len(found)
    assert all(window == tuple(range(window[0], window[-1] + 1)) for window in found)
    assert all(0 <= layer < depth for window in found for layer in window)
    assert len(set().union(*found)) <= max(most, len(start))


def test_a_large_model_gets_windows_below_and_above_the_start() -> None:
    found = windows(START.layers, 30, 12)
    assert {(2, 3, 4, 5, 6), (4, 5, 6), (5, 6, 7)} <= set(found)
    assert any(window[-1] > 8 for window in found)


def test_after_a_start_that_is_far_off_come_the_layers_where_most_models_learn() -> None:
    start, second, *others = windows((14, 15, 16, 17, 18), 30, 12)
    assert start == (14, 15, 16, 17, 18)
    assert 4 <= second[0] <= second[-1] <= 9
    assert others


def test_each_rung_varies_what_it_is_named_for() -> None:
    ladder = rungs([(4, 5, 6, 7, 8), (2, 3, 4)])
    layers, decay, size, step, divergence, update = ladder
    assert {v.layers for v in layers.vary(START)} == {(4, 5, 6, 7, 8), (2, 3, 4)}
    assert [v.v_weight_decay for v in decay.vary(START)] == list(DECAYS)
    assert [v.kl_factor for v in divergence.vary(START)] == list(KL_FACTORS)
    assert [v.clamp_norm_factor for v in size.vary(START)] == list(CLAMPS)
    assert [v.v_lr for v in step.vary(START)] == list(RATES)
    assert {v.solves for v in update.vary(START)} == {1, 2}
    # Only the layers and what the update alone reads vary at once: targets serve many trials.
    assert {(v.v_lr, v.clamp_norm_factor, v.layers) for v in update.vary(START)} == {
        (START.v_lr, START.clamp_norm_factor, START.layers)
    }
    assert sum(rung.budget for rung in ladder) == pytest.approx(1.0)


def test_contexts_in_chat_are_tried_where_they_are_asked_for() -> None:
    ladder = rungs([START.layers], chat=True)
    assert sum(rung.budget for rung in ladder) == pytest.approx(1.0)
    assert [rung.name for rung in ladder if rung.said] == ["contexts", "update"]
    contexts = ladder[-2]
    assert {v.contexts for v in contexts.vary(START)} == {"completion", "chat", "both"}
    assert "contexts" not in written(contexts.vary(START)[0])
    assert "contexts" not in [rung.name for rung in rungs([START.layers])]


def test_a_setting_is_written_as_a_file_that_is_read_back() -> None:
    for setting in (START, *rungs([START.layers])[-1].vary(START)):
        values = written(setting)
        again = PMETHyperParams.from_dict(values)
        assert written(again) == values
        assert ("mom2_update_weight" in values) == (setting.mom2_update_share is None)


@given(st.integers(1, 200))
def test_a_model_without_published_values_has_a_start(depth: int) -> None:
    start = start_for(depth)
    assert start.layers == tuple(range(start.layers[0], start.target_layer + 1))
    assert 0 <= start.layers[0] <= start.target_layer < depth
    assert PMETHyperParams.from_dict(written(start)) == start


def test_the_start_is_where_published_values_are() -> None:
    """GPT-J's 3 to 8 of 28 layers, and 1/4 of the way up for others: 4 to 8 of 32 for Llama."""
    assert start_for(28).layers == (3, 4, 5, 6, 7, 8)
    assert abs(start_for(32).target_layer - 8) <= 1
