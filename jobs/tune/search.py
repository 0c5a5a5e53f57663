"""Successive halving: many settings on few facts, the best of them on more."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import median
from typing import Any

from jobs.tune.space import Rung, Setting, changed

SMALLEST = 8
"""Facts of a trial, unless there are fewer: on less than these, scores are mostly chance."""


@dataclass(frozen=True)
class Score:
    """How good an edit is.

    Attributes:
        value: higher is better, 0 to 1.
        excess: by how much perplexity has risen beyond what is allowed, relative to the base's.
        figures: what it is made of.
        failure: why the trial came to no result.
    """

    value: float
    excess: float = 0.0
    figures: Mapping[str, float | None] = field(default_factory=dict)
    failure: str | None = None

    @property
    def allowed(self) -> bool:
        """Whether there is a result, and the edited model has kept its other abilities."""
        return self.failure is None and not self.excess

    @property
    def rank(self) -> float:
        """What settings are compared by: each per cent of excess costs a point."""
        return -math.inf if self.failure else self.value - self.excess


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        rung: name of the rung.
        setting: the hyper-parameters.
        facts: number of facts edited.
        score: the result.
        seconds: what it took.
    """

    rung: str
    setting: Setting
    facts: int
    score: Score
    seconds: float


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        best: the setting that won the last rung.
        trials: all trials, in their order. A setting that a rung has kept is not tried again if
            the next one edits as many facts and asks the model as much.
        left_out: for each rung, how many settings there was no time for.
    """

    best: Setting
    trials: list[Trial]
    left_out: dict[str, int]


def search(
    start: Setting,
    rungs: Sequence[Rung],
    run: Callable[[Rung, Setting, int], tuple[Score, float]],
    *,
    facts: int,
    budget_s: float,
    seed: int,
    judged: int = 0,
) -> Found:
    """Find the best setting that the time allows.

    Each rung tries the settings that the one before has kept, and variants of them. It ends when
    another trial as long as its last would go past its share of the time, which what earlier
    rungs left over adds to; every rung makes one trial at least. Only the seconds that trials took
    count, so a search that is resumed decides as it would have without the interruption.

    Time is set aside for judging two settings on facts of their own: as much for each fact as the
    median trial took for one of its own, and half of all the time at most.

    Args:
        start: the setting to start from; it is tried in the first rung.
        rungs: the steps.
        run: tries a setting on a number of facts; returns its score and the seconds it took.
        facts: number of trial facts.
        budget_s: seconds for all rungs and for judging.
        seed: decides in which order variants are tried.
        judged: number of facts that the result is judged on.
    """
    spent = share = 0.0
    kept, trials, left_out = [start], list[Trial](), dict[str, int]()
    known: dict[tuple[str, int, bool], Trial] = {}
    for rung in rungs:
        share += rung.budget
        count = min(facts, max(SMALLEST, round(rung.part * facts)))
        here: list[Trial] = []
        settings = _settings(kept, rung, seed)
        for setting in settings:
            name = (_identity(setting), count, rung.said)
            if name not in known:
                # The first one also measures the base model.
                searching_s = budget_s - _set_aside(trials, judged, budget_s)
                if here and spent + here[-1].seconds > share * searching_s:
                    break
                score, seconds = run(rung, setting, count)
                spent += seconds
                known[name] = Trial(rung.name, setting, count, score, seconds)
                trials.append(known[name])
            here.append(known[name])
        left_out[rung.name] = len(settings) - len(here)
        here.sort(key=lambda trial: trial.score.rank, reverse=True)
        best = here[0].score.rank
        # Variants of a setting that is far behind would only take the others' time.
        kept = [trial.setting for trial in here[: rung.keep] if trial.score.rank >= best / 2]
        kept = kept or [here[0].setting]
    return Found(kept[0], trials, left_out)


def _set_aside(trials: Sequence[Trial], judged: int, budget_s: float) -> float:
    """Seconds to keep for judging two settings, going by the trials so far."""
    # Not the slowest: the first one starts the workers and measures the base model.
    each = median(trial.seconds / trial.facts for trial in trials) if trials else 0.0
    return min(2 * judged * each, budget_s / 2)


def _settings(kept: Sequence[Setting], rung: Rung, seed: int) -> list[Setting]:
    """The settings of a rung: those kept, then their variants, mixed unless they are ordered."""
    # In turn: if there is no time for all, each of those kept has had its most promising ones.
    turns = zip_longest(*(rung.vary(setting) for setting in kept))
    variants = [variant for turn in turns for variant in turn if variant is not None]
    if not rung.ordered:
        random.Random(f"{seed} {rung.name}").shuffle(variants)
    alike: dict[Any, Setting] = {}
    for setting in (*kept, *variants):
        alike.setdefault(_identity(setting), setting)
    return list(alike.values())


def _identity(setting: Setting) -> str:
    """What settings that edit alike share: λ as a number counts for nothing beside a share."""
    if setting.mom2_update_share is not None:
        setting = changed(setting, mom2_update_weight=1.0)
    return setting.model_dump_json()
