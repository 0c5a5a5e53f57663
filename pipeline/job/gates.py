"""Gates: what a job may demand of the edited model, and whether it gets it.

A gate has one name: its key under ``gates`` in a job, its ``name`` in ``metrics.json``, and what
reports, comparisons and the terminal call it. Where it asks for at least so much, that is the name
of its figure; other gates say the rest at the end:

    specificity                     after is at least the threshold
    perplexity_increase             after is at most so much above before, relatively
    specificity_drop                after is at most so much below before
    specificity_drop_since_last     after is at most so much below the last run's after
    rounding                        at most so much of Δ is rounded off, in any edited weight
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pmet.evaluation import KINDS, METRICS

Kind = Literal["least", "most", "increase", "drop", "drop_since_last"]

INCREASE = "perplexity_increase"
SHARES = (*METRICS[: len(KINDS)], "score", *METRICS[len(KINDS) :], "agreement", "consistency")
"""Figures that are fractions; of more of each a model is better."""
ROUNDING = "rounding"
"""Of the edited weights: the share of Δ that the stored dtype rounds off."""
NOTHING_LAST = "nothing to compare with"
UNDEFINED = "not a finite number, and nothing that is undefined passes"


@dataclass(frozen=True)
class Gate:
    """One demand that can be made.

    Attributes:
        figure: what it looks at.
        kind: how.
    """

    figure: str
    kind: Kind

    @property
    def name(self) -> str:
        """What it is called everywhere."""
        return self.figure if self.kind in ("least", "most") else f"{self.figure}_{self.kind}"

    @property
    def is_fraction(self) -> bool:
        """Whether its threshold is a fraction from 0 to 1."""
        return self.figure in SHARES or self.figure == ROUNDING

    @property
    def description(self) -> str:
        """A line of help."""
        name = self.figure.replace("_strict", ", strict form").replace("_accuracy", ", by tokens")
        match self.kind:
            case "least":
                return f"Least {name} of the edited model."
            case "most":
                return "Largest share of Δ that the stored dtype may round off, in any layer."
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

        A value that could not be measured does not pass, since it may be anything; nor does one
        that is undefined. But where there is no last run, or none that measured this, there is
        nothing to be worse than.
        """
        after = metrics["after"].get(self.figure)
        said: dict[str, Any] = {}
        match self.kind:
            case "least":
                value = after
            case "most":
                value = (metrics.get("weights") or {}).get(self.figure)
            case "increase":
                value = _increase(metrics["before"].get(self.figure), after)
            case "drop":
                value = _drop(metrics["before"].get(self.figure), after)
            case "drop_since_last":
                earlier = (last or {}).get(self.figure)
                value = _drop(earlier, after)
                if earlier is None and after is not None:
                    said = {"note": NOTHING_LAST}
        if value is None and (after is None or math.isfinite(after)):
            passed = bool(said)
        elif value is None or not math.isfinite(value):
            passed, said = False, {"note": UNDEFINED}
        else:
            passed = value >= threshold if self.kind == "least" else value <= threshold
        gate = {"name": self.name, "kind": self.kind, "threshold": threshold, "value": value}
        return {**gate, "passed": passed, **said}


def _gates() -> dict[str, Gate]:
    least = [*SHARES, "fluency"]
    gates = [Gate(figure, "least") for figure in least]
    gates += [Gate("perplexity", "increase"), Gate(ROUNDING, "most")]
    # What the base says agrees with what the base says.
    gates += [Gate(figure, "drop") for figure in least if figure != "agreement"]
    gates += [Gate(figure, "drop_since_last") for figure in least]
    return {gate.name: gate for gate in gates}


GATES = _gates()
"""Every gate, by its name."""


def outcomes(
    thresholds: Mapping[str, float],
    metrics: Mapping[str, Any],
    last: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Each gate that is asked for with the value it saw and whether it was passed.

    Args:
        thresholds: by name of the gate.
        metrics: ``before``, ``after`` and ``weights``.
        last: ``after`` of the run to compare with; None where there is none.
    """
    return [GATES[name].outcome(value, metrics, last) for name, value in thresholds.items()]


def _increase(before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    # Anything would be little beside an infinite figure of the base.
    return after / before - 1 if before and math.isfinite(before) else math.nan


def _drop(before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    return before - after if math.isfinite(before) else math.nan
