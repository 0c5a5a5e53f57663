"""Gates: what a job may demand of the edited model, and whether the model meets it.

A gate has one name: the key under ``gates`` in a job, ``name`` in ``metrics.json``, and the name in
reports, comparisons and the terminal. If the gate sets a minimum, that is the name of its figure;
otherwise the ending names the kind:

    specificity                     after is at least the threshold
    perplexity_increase             after is at most so much above before, relatively
    specificity_drop                after is at most so much below before
    specificity_drop_since_last     after is at most so much below the last run's after
    rounding                        at most so much of Δ is rounded off, in any edited weight
    harness_task_drop               after is at most so much worse than before, in any task of
                                    lm-evaluation-harness
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pmet.evaluation import AMISS, KEPT, KINDS, METRICS, SAID

Kind = Literal["least", "most", "increase", "drop", "drop_since_last"]

INCREASE = "perplexity_increase"
HARNESS = "harness"
"""The figure of general abilities: the mean over tasks of lm-evaluation-harness."""
TASK_DROP = "harness_task_drop"
"""The gate on single tasks: how much worse the edited model is in the worst of them."""
OF_HARNESS = (HARNESS, TASK_DROP)
SHARES = (
    *(*SAID, *KEPT),
    *(*METRICS[: len(KINDS)], "score", *METRICS[len(KINDS) :], "agreement", "consistency"),
    HARNESS,
)
"""Figures that are fractions, where higher is better."""
ROUNDING = "rounding"
"""The gate on the edited weights: the share of Δ that the stored dtype rounds off."""
NOTHING_LAST = "nothing to compare with"
UNDEFINED = "not a finite number, and nothing that is undefined passes"


@dataclass(frozen=True)
class Gate:
    """One kind of demand.

    Attributes:
        figure: the figure it checks.
        kind: how it checks it.
    """

    figure: str
    kind: Kind

    @property
    def name(self) -> str:
        """The name of the gate, everywhere."""
        return self.figure if self.kind in ("least", "most") else f"{self.figure}_{self.kind}"

    @property
    def is_fraction(self) -> bool:
        """Whether the threshold is a fraction from 0 to 1."""
        return self.figure in (*SHARES, *AMISS, ROUNDING, TASK_DROP)

    @property
    def description(self) -> str:
        """A line of help."""
        name = self.figure.replace("_strict", ", strict form").replace("_accuracy", ", by tokens")
        match self.kind:
            case "least":
                return f"Minimum {name} of the edited model."
            case "most" if self.figure == ROUNDING:
                return "Maximum share of Δ that the stored dtype may round off, in any layer."
            case "most" if self.figure == TASK_DROP:
                return "Maximum drop in any task of evaluate.harness below the base model's."
            case "most":
                return f"Maximum {name.replace('_', ' ')} of the edited model."
            case "increase":
                return f"Maximum relative increase in {name}: 0.02 is 2 %."
            case "drop":
                return f"Maximum drop in {name} below the base model's."
            case "drop_since_last":
                return f"Maximum drop in {name} below the last run's (evaluate.last)."

    def outcome(
        self, threshold: float, metrics: Mapping[str, Any], last: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The value the gate saw, and whether the edited model passes.

        A value that could not be measured does not pass, since it may be anything, and neither does
        an undefined one. But if there is no last run, or it did not measure this, the model passes:
        it cannot be worse than nothing.
        """
        after = metrics["after"].get(self.figure)
        said: dict[str, Any] = {}
        match self.kind:
            case "least":
                value = after
            case "most" if self.figure == ROUNDING:
                value = (metrics.get("weights") or {}).get(self.figure)
            case "most" if self.figure == TASK_DROP:
                value = after = (metrics.get(HARNESS) or {}).get("largest_drop")
            case "most":
                value = after
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
    gates += [Gate("perplexity", "increase"), Gate(ROUNDING, "most"), Gate(TASK_DROP, "most")]
    gates += [Gate(figure, "most") for figure in AMISS]
    # The base model always agrees with itself.
    gates += [Gate(figure, "drop") for figure in least if figure not in ("agreement", *KEPT)]
    gates += [Gate(figure, "drop_since_last") for figure in least]
    return {gate.name: gate for gate in gates}


GATES = _gates()
"""Every gate, by its name."""


def outcomes(
    thresholds: Mapping[str, float],
    metrics: Mapping[str, Any],
    last: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate each gate that is set: the value it saw, and whether it was passed.

    Args:
        thresholds: by name of the gate.
        metrics: ``before``, ``after`` and ``weights``.
        last: ``after`` of the run to compare with; None if there is none.
    """
    return [GATES[name].outcome(value, metrics, last) for name, value in thresholds.items()]


def _increase(before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    # Compared with an infinite figure of the base, any increase would be small.
    return after / before - 1 if before and math.isfinite(before) else math.nan


def _drop(before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    return before - after if math.isfinite(before) else math.nan
