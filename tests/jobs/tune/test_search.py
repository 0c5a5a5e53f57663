"""The search, on scores that are known."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.tune.search import Found, Score, _settings, search
from jobs.tune.space import (
    CLAMPS,
    DECAYS,
    KL_FACTORS,
    RATES,
    SHARES,
    SOLVES,
    SPREADS,
    Rung,
    Setting,
    changed,
    rungs,
)

START = Setting(layers=(8, 9, 10), clamp_norm_factor=0.75, mom2_update_weight=15000)
WINDOWS = [(8, 9, 10), (2, 3, 4), (4, 5, 6)]
WANTED = {
    "layers": st.sampled_from(WINDOWS),
    "v_weight_decay": st.sampled_from(DECAYS),
    "clamp_norm_factor": st.sampled_from(CLAMPS),
    "v_lr": st.sampled_from(RATES),
    "kl_factor": st.sampled_from(KL_FACTORS),
    "mom2_update_share": st.sampled_from(SHARES),
    "spread": st.sampled_from(SPREADS),
    "solves": st.sampled_from(SOLVES),
}


class Surface:
    """Scores that grow with each value that is as wanted."""

    def __init__(self, wanted: dict[str, object], seconds: float = 1.0) -> None:
        self.wanted, self.seconds = wanted, seconds
        self.asked: list[tuple[str, str, int]] = []

    def __call__(self, rung: Rung, setting: Setting, facts: int) -> tuple[Score, float]:
        self.asked.append((rung.name, setting.model_dump_json(), facts))
        right = sum(getattr(setting, name) == value for name, value in self.wanted.items())
        return Score(right / len(self.wanted)), self.seconds


def found(surface: Surface, budget_s: float, seed: int = 0) -> Found:
    ladder = rungs(WINDOWS)
    return search(START, ladder, surface, facts=40, budget_s=budget_s, seed=seed)


@settings(max_examples=25)
@given(st.fixed_dictionaries(WANTED), st.integers(0, 5))
def test_with_time_enough_the_best_of_the_grid_is_found(
    wanted: dict[str, object], seed: int
) -> None:
    surface = Surface(wanted)
    best = found(surface, math.inf, seed).best
    assert {name: getattr(best, name) for name in wanted} == wanted
    # Whatever the rung: the same setting on the same facts would only give the same score.
    assert max(Counter(asked[1:] for asked in surface.asked).values()) == 1


@settings(max_examples=25)
@given(st.fixed_dictionaries(WANTED), st.floats(0, 60), st.floats(0.1, 10))
def test_the_time_is_kept_but_for_a_trial_in_each_rung(
    wanted: dict[str, object], budget_s: float, seconds: float
) -> None:
    result = found(Surface(wanted, seconds), budget_s)
    assert len(result.trials) * seconds <= budget_s + 6 * seconds + 1e-6
    assert result.trials[-1].rung == "update"
    assert result.trials[-1].facts == 40


@settings(max_examples=25)
@given(st.floats(1, 200), st.floats(0.01, 10), st.integers(0, 400))
def test_time_is_left_to_judge_two_settings(budget_s: float, seconds: float, judged: int) -> None:
    surface = Surface({"solves": 2}, seconds)
    ladder = rungs(WINDOWS)
    found = search(START, ladder, surface, facts=40, budget_s=budget_s, seed=0, judged=judged)
    spent = len(found.trials) * seconds
    each = median(trial.seconds / trial.facts for trial in found.trials)
    judging = min(2 * judged * each, budget_s / 2)
    assert spent + judging <= budget_s + len(ladder) * seconds + 1e-6


def test_a_trial_has_facts_enough_to_tell_settings_apart() -> None:
    for facts, least in ((5, 5), (20, 8), (100, 25)):
        surface = Surface({"solves": 2})
        search(START, rungs(WINDOWS), surface, facts=facts, budget_s=100, seed=0)
        assert min(count for _, _, count in surface.asked) == least


def test_the_last_rung_asks_again_even_where_all_rungs_edit_the_same_facts() -> None:
    surface = Surface({"solves": 2})
    search(START, rungs(WINDOWS), surface, facts=5, budget_s=1000, seed=0)
    tried = [(setting, facts) for rung, setting, facts in surface.asked if rung == "update"]
    before = [(setting, facts) for rung, setting, facts in surface.asked if rung != "update"]
    assert set(tried) & set(before)


def test_if_time_is_short_what_is_nearest_to_the_best_is_tried_first() -> None:
    kept = [changed(START, mom2_update_share=share, spread="linear") for share in (0.1, 0.4)]
    order = _settings(kept, rungs(WINDOWS)[-1], 0)
    assert order[:2] == kept
    # First those that differ in one option, from either, then in more.
    differing = [
        min(
            sum(
                getattr(one, name) != getattr(variant, name)
                for name in ("mom2_update_share", "spread", "solves")
            )
            for one in kept
        )
        for variant in order
    ]
    assert differing == sorted(differing)
    assert differing[-1] > 1


def test_more_facts_are_edited_from_rung_to_rung() -> None:
    result = found(Surface({"solves": 2}), 100)
    assert next(trial.facts for trial in result.trials if trial.rung == "layers") == 10
    assert {trial.facts for trial in result.trials if trial.rung == "update"} == {40}


def test_the_same_seed_makes_the_same_search() -> None:
    one, again, other = (Surface({"v_lr": 0.5}) for _ in range(3))
    found(one, 30, 1)
    found(again, 30, 1)
    found(other, 30, 2)
    assert one.asked == again.asked
    assert one.asked != other.asked


def test_perplexity_beyond_what_is_allowed_costs_as_much_as_it_rises() -> None:
    def run(_rung: Rung, setting: Setting, _facts: int) -> tuple[Score, float]:
        wide = setting.clamp_norm_factor > 1.5
        return Score(0.9 if wide else 0.3, excess=excess if wide else 0.0), 1.0

    def best() -> float:
        ladder = rungs(WINDOWS)
        found = search(START, ladder, run, facts=40, budget_s=1000, seed=0)
        return found.best.clamp_norm_factor

    excess = 0.5
    assert best() > 1.5
    excess = 0.7
    assert best() <= 1.5


def test_a_trial_without_a_result_never_wins() -> None:
    def run(_rung: Rung, setting: Setting, _facts: int) -> tuple[Score, float]:
        failed = setting.clamp_norm_factor > 1.5
        return Score(0.0, failure="it is not finite" if failed else None), 1.0

    found = search(START, rungs(WINDOWS), run, facts=40, budget_s=1000, seed=0)
    assert found.best.clamp_norm_factor <= 1.5
    assert any(trial.score.failure and not trial.score.allowed for trial in found.trials)
