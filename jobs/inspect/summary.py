"""What traces and optimisations of many facts show together, with intervals over facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.evaluation import of_mean
from pmet.hparams import PMETHyperParams
from pmet.inspection import MOVING, WAYS, Optimised, State, Trace, best_window, window_states


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """A mean over facts with its 95 % interval."""
    return {"mean": fmean(values), "interval": of_mean(values)}


def summary_of_traces(
    states: Sequence[State], traces: Sequence[Trace], width: int
) -> dict[str, Any]:
    """The mean indirect effects, and the window that they recommend.

    Args:
        states: what was restored.
        traces: at least one of a known fact.
        width: layers in the window.
    """
    known = [trace for trace in traces if trace.known]
    effects_NF = [
        [trace.restored[n] - trace.corrupted for trace in known] for n in range(len(states))
    ]
    means = [mean_of(effects) for effects in effects_NF]
    best = best_window(states, [m["mean"] for m in means], width)
    return {
        "tracing": {
            "clean": mean_of([trace.clean for trace in known]),
            "corrupted": mean_of([trace.corrupted for trace in known]),
            "states": [
                {"part": state.part, "layers": list(state.layers), **mean}
                for state, mean in zip(states, means, strict=True)
            ],
        },
        "window": {
            "layers": list(states[best].layers),
            **means[best],
            "others": [
                _compared(states[n], means[n], effects_NF[best], effects_NF[n])
                for n in window_states(states, width)
                if n != best
            ],
        },
    }


def _compared(
    state: State, mean: Mapping[str, Any], best: Sequence[float], own: Sequence[float]
) -> dict[str, Any]:
    """A window beside the best one: by how much it is behind, and whether that is certain."""
    behind = of_mean([a - b for a, b in zip(best, own, strict=True)])
    return {
        "layers": list(state.layers),
        **mean,
        "behind": behind,
        "certain": behind is not None and behind[0] > 0,
    }


def summary_of_states(
    hparams: PMETHyperParams, outcomes: Sequence[Optimised], depth: int
) -> dict[str, Any]:
    """How far outputs move at the subject's last token, and what either vector reaches alone."""
    done = [outcome for outcome in outcomes if outcome.failure is None]
    record: dict[str, Any] = {
        "layers": list(hparams.layers),
        "facts": len(done),
        "failed": len(outcomes) - len(done),
    }
    if not done:
        return {**record, "probability": {}, "moved": []}
    probability = {"before": mean_of([o.before for o in done])}
    probability |= {way: mean_of([o.reached[way] for o in done]) for way in WAYS}
    # Below the layer of the free vectors nothing moves.
    moved = [
        {
            "layer": layer,
            **{
                part: {
                    "moved": mean_of([o.moved[part, layer] for o in done]),
                    "similarity": mean_of([o.similarity[part, layer] for o in done]),
                }
                for part in MOVING
                if (part, layer) in done[0].moved
            },
        }
        for layer in range(hparams.target_layer, depth)
    ]
    return {**record, "probability": probability, "moved": moved}
