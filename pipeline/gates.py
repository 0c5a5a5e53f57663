"""Gates: what a job may demand of the edited model, and whether it gets it.

A gate's key is its metric where it asks for at least so much, and says the rest at its end:

    specificity                     after is at least the threshold
    perplexity_increase             after is at most so much above before, relatively
    specificity_drop                after is at most so much below before
    specificity_drop_since_last     after is at most so much below the last run's after
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pmet.figures import KINDS, METRICS

Kind = Literal["least", "increase", "drop", "drop_since_last"]

INCREASE = "perplexity_increase"
SHARES = (*METRICS[: len(KINDS)], "score", *METRICS[len(KINDS) :], "agreement", "consistency")
"""Metrics that are fractions; of more of each a model is better."""
NOTHING_LAST = "nothing to compare with"


@dataclass(frozen=True)
class Gate:
    """One demand that can be made.

    Attributes:
        metric: what it looks at.
        kind: how.
    """

    metric: str
    kind: Kind

    @property
    def key(self) -> str:
        """Its key in a job."""
        return self.metric if self.kind == "least" else f"{self.metric}_{self.kind}"

    @property
    def is_fraction(self) -> bool:
        """Whether its threshold is a fraction from 0 to 1."""
        return self.metric in SHARES

    @property
    def description(self) -> str:
        """A line of help."""
        name = self.metric.replace("_strict", ", strict form").replace("_accuracy", ", by tokens")
        match self.kind:
            case "least":
                return f"Least {name} of the edited model."
            case "increase":
                return f"Most that the {name} may rise, relative to before: 0.02 is 2 %."
            case "drop":
                return f"Most that the {name} may be below the base's."
            case "drop_since_last":
                return f"Most that the {name} may be below the last run's (evaluate.last)."

    def outcome(
        self, threshold: float, metrics: Mapping[str, Any], last: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """What the gate saw, and whether it lets the edited model pass.

        A value that could not be measured does not pass: nobody knows that it is good enough. But
        where there is no last run, or none that measured this, there is nothing to be worse than.
        """
        after = metrics["after"].get(self.metric)
        said: dict[str, Any] = {}
        match self.kind:
            case "least":
                value = after
            case "increase":
                value = _increase(metrics["before"].get(self.metric), after)
            case "drop":
                value = _drop(metrics["before"].get(self.metric), after)
            case "drop_since_last":
                earlier = (last or {}).get(self.metric)
                value = _drop(earlier, after)
                if earlier is None and after is not None:
                    said = {"note": NOTHING_LAST}
        if value is None:
            passed = bool(said)
        else:
            passed = value >= threshold if self.kind == "least" else value <= threshold
        gate = {"metric": self.key, "kind": self.kind, "threshold": threshold, "value": value}
        return {**gate, "passed": passed, **said}


def _gates() -> dict[str, Gate]:
    least = [*SHARES, "fluency"]
    gates = [Gate(metric, "least") for metric in least] + [Gate("perplexity", "increase")]
    # What the base says agrees with what the base says.
    gates += [Gate(metric, "drop") for metric in least if metric != "agreement"]
    gates += [Gate(metric, "drop_since_last") for metric in least]
    return {gate.key: gate for gate in gates}


GATES = _gates()
"""Every gate, by its key."""


def outcomes(
    thresholds: Mapping[str, float],
    metrics: Mapping[str, Any],
    last: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Each gate that is asked for with the value it saw and whether it was passed.

    Args:
        thresholds: by key of the gate.
        metrics: ``before`` and ``after``.
        last: ``after`` of the run to compare with; None where there is none.
    """
    return [GATES[key].outcome(value, metrics, last) for key, value in thresholds.items()]


def _increase(before: float | None, after: float | None) -> float | None:
    if before is None or after is None or not math.isfinite(after):
        return None
    return after / before - 1


def _drop(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
