"""The layers to edit, as a trace suggests them.

An edit writes new FFN outputs at the subject's last token, into a window of neighboring layers. So
the window whose FFN outputs, restored together at that token, bring back most of a forgotten fact
is the one that facts are read from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from pmet.inspection.tracing import State

FEWEST = 3
"""Layers in a window, at least, if hyper-parameters do not say how many."""


def default_width(depth: int) -> int:
    """The number of layers to edit in a model: 5 of 28, as published, and at least three."""
    return min(depth, max(FEWEST, round(5 * depth / 28)))


def window_states(states: Sequence[State], width: int) -> list[int]:
    """The numbers of the states that are windows to edit, lowest first: FFN outputs of ``width``
    layers, of which the last one has an attention output for δ_a.
    """
    attention = {s.layers[0] for s in states if s.part == "attention" and len(s.layers) == 1}
    return [
        n
        for n, s in enumerate(states)
        if s.part == "ffn" and len(s.layers) == width and s.layers[-1] in attention
    ]


def best_window(states: Sequence[State], effects: Sequence[float], width: int) -> int:
    """The number of the window with the largest mean indirect effect, of equal ones the lowest.

    Args:
        states: what was restored.
        effects: the mean indirect effect of each.
        width: layers in a window; at least one state is such a window.
    """
    return max(window_states(states, width), key=lambda n: effects[n])
