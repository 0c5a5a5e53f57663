"""The settings that are tried, one rung after the other, from what matters most.

λ is tried as a share of the scale of the keys (`pmet.update.update_weight`): the same shares suit
any model, any layers and any number of facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

from pmet.hparams import PMETHyperParams
from pmet.model import Contexts

DECAYS = (0.0, 0.5)
CLAMPS = (0.75, 1.5, 2.0, 3.0, 4.0)
RATES = (0.1, 0.2, 0.5)
KL_FACTORS = (0.0625, 0.25, 1.0)
SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
SPREADS = ("sqrt", "linear")
SOLVES = (1, 2)
LENGTHS = (3, 5)
"""Numbers of layers to try, besides that of the start."""
SHALLOW, LENGTHS_OF_SHALLOW = 12, (1, 2, 3)
"""The same for models with fewer layers than that."""
_MIDDLING: dict[str, Any] = {"mom2_update_share": 0.2, "spread": "linear", "solves": 1}
"""Options of the update that are far from none of the best ones, while others are sought."""
_MIDDLING_CLAMP = 2.0
_LOWER = 2 / 3
"""The part of the layers, from the lowest one on, in which facts are sought."""


class Setting(PMETHyperParams):
    """Hyper-parameters, and the contexts of a job that targets are optimised in."""

    contexts: Contexts = "completion"

    @classmethod
    def of(cls, hparams: PMETHyperParams, contexts: Contexts) -> Setting:
        """Add contexts to hyper-parameters, which are valid already."""
        return cls.model_construct(**dict(hparams), contexts=contexts)


@dataclass(frozen=True)
class Rung:
    """A step of the search.

    Attributes:
        name: what it varies.
        part: the share of the trial facts that it edits.
        keep: how many settings go on to the next rung.
        budget: its share of the time.
        vary: the variants of a setting.
        ordered: whether the first variants are the most promising; else they are mixed.
        said: whether the model is asked to say something, which takes longer.
    """

    name: str
    part: float
    keep: int
    budget: float
    vary: Callable[[Setting], list[Setting]]
    ordered: bool = False
    said: bool = False


def rungs(layers: Sequence[Sequence[int]], *, chat: bool = False) -> list[Rung]:
    """The rungs of a search.

    Args:
        layers: the windows of layers to try.
        chat: whether to try contexts in chat.
    """

    def of_layers(setting: Setting) -> list[Setting]:
        middling = changed(setting, clamp_norm_factor=_MIDDLING_CLAMP, **_MIDDLING)
        return [changed(middling, layers=tuple(window)) for window in layers]

    def of_decay(setting: Setting) -> list[Setting]:
        return [changed(setting, v_weight_decay=decay) for decay in DECAYS]

    def of_size(setting: Setting) -> list[Setting]:
        return [changed(setting, clamp_norm_factor=clamp) for clamp in CLAMPS]

    def of_step(setting: Setting) -> list[Setting]:
        return [changed(setting, v_lr=rate) for rate in RATES]

    def of_divergence(setting: Setting) -> list[Setting]:
        return [changed(setting, kl_factor=factor) for factor in KL_FACTORS]

    def of_update(setting: Setting) -> list[Setting]:
        variants = [
            changed(setting, mom2_update_share=share, spread=spread, solves=solves)
            for share, spread, solves in product(SHARES, SPREADS, SOLVES)
        ]
        return sorted(variants, key=lambda variant: _distance(setting, variant))

    def of_contexts(setting: Setting) -> list[Setting]:
        return [changed(setting, contexts=kind) for kind in get_args(Contexts)]

    in_chat = [Rung("contexts", 0.5, 2, 0.1, of_contexts, said=True)] if chat else []
    return [
        Rung("layers", 0.25, 3, 0.35, of_layers, ordered=True),
        # Before the clamp: a decay that keeps δ small makes the ball's radius count for nothing.
        Rung("decay", 0.25, 3, 0.05, of_decay),
        Rung("clamp", 0.5, 2, 0.15, of_size),
        Rung("rate", 0.5, 2, 0.1, of_step),
        Rung("kl", 0.5, 2, 0.05, of_divergence),
        *in_chat,
        Rung("update", 1.0, 1, 0.2 if chat else 0.3, of_update, ordered=True, said=True),
    ]


def _distance(one: Setting, other: Setting) -> tuple[int, float]:
    """In how many options of the update two settings differ, and how far their shares are apart."""
    share, others = one.mom2_update_share, other.mom2_update_share
    apart = abs(math.log(share / others)) if share and others else 0.0
    differing = (one.spread != other.spread) + (one.solves != other.solves) + (apart > 0)
    return differing, apart


def start_for(depth: int) -> PMETHyperParams:
    """A start for a model without published values.

    Its layers are where the published ones are in GPT-J: 3 to 8 of 28, the last of which is 2/7 of
    the way up. Its other values are the middle ones of those that are tried.

    Args:
        depth: number of layers of the model.
    """
    last = round(depth * 2 / 7)
    count = max(1, min(6, round(depth * 6 / 28)))
    layers = tuple(range(max(0, last - count + 1), last + 1))
    return PMETHyperParams(layers=layers, clamp_norm_factor=_MIDDLING_CLAMP, **_MIDDLING)


def windows(start: Sequence[int], depth: int, most: int) -> list[tuple[int, ...]]:
    """Windows of neighboring layers: the start's own, then those nearest to `start_for`'s.

    Args:
        start: the layers of the start.
        depth: number of layers of the model.
        most: how many different layers there may be in all windows: each needs a second moment.
    """
    last = max(1, round(_LOWER * depth))
    found = [tuple(start)]
    lengths = LENGTHS_OF_SHALLOW if depth < SHALLOW else LENGTHS
    for length in dict.fromkeys((len(start), *lengths)):
        step = max(1, length // 2)
        found += [tuple(range(i, i + length)) for i in range(0, last - length + 1, step)]
    # What there is no time for, or no room, is then far from where most models learn.
    usual = start_for(depth).layers
    middle = sum(usual) / len(usual)
    found.sort(key=lambda window: abs(sum(window) / len(window) - middle))
    kept: list[tuple[int, ...]] = []
    for window in dict.fromkeys((tuple(start), *found)):
        if len(set(window).union(*kept)) <= max(most, len(start)):
            kept.append(window)
    return kept


def changed(setting: Setting, **values: Any) -> Setting:
    """The setting with other values."""
    return setting.model_copy(update=values)


def written(setting: PMETHyperParams) -> dict[str, Any]:
    """A setting as the contents of a file of hyper-parameters; contexts are the job's."""
    return dict(_written(setting))


def _written(setting: PMETHyperParams) -> Iterator[tuple[str, Any]]:
    for name, value in setting.model_dump(mode="json", exclude={"contexts"}).items():
        instead = name == "mom2_update_weight" and setting.mom2_update_share is not None
        if value is not None and not instead:
            yield name, value
