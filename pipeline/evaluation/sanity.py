"""Anomalies of an edit besides its scores: layers that changed too much, diverging targets.

Scores alone may not show that a model answers the edited prompts and nothing else. These signs are
known before anything is measured; each becomes a warning of the run, and is marked in its report.
docs/metrics.md has the measurements behind the limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.figures import is_number, show_special

CHANGE_WARNED = 10.0
"""‖Δ‖/‖W‖ above which a layer causes a warning: it holds more of the edit than of the model."""
ROUNDING_WARNED = 0.5
"""Share of Δ rounded off by the stored dtype above which a layer causes a warning."""
LOSS_WARNED = 1.0
"""Nats that a target's last loss may lie above its first one."""
_NAMED = 5


def is_astray(first_loss: Any, last_loss: Any) -> bool:
    """Whether an optimisation ended far above its start, if both losses are known."""
    return is_number(first_loss) and is_number(last_loss) and last_loss > first_loss + LOSS_WARNED


def changes_too_much(share: Any) -> bool:
    """Whether a layer's ‖Δ‖/‖W‖ causes a warning; an undefined one does."""
    return not is_number(share) or share > CHANGE_WARNED


def rounds_too_much(rounding: Any) -> bool:
    """Whether the share of a layer's Δ that its dtype rounds off causes a warning."""
    return not is_number(rounding) or rounding > ROUNDING_WARNED


def warnings_of_layers(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each layer that changed too much, or whose change is mostly rounded off.

    Args:
        layers: with ``parameter``, ``share``, ``rounding`` and ``dtype``; the last two may be
            missing.
    """
    said = []
    for layer in layers:
        name, share, rounding = layer["parameter"], layer["share"], layer.get("rounding", 0.0)
        if changes_too_much(share):
            said.append(
                f"{name}: ‖Δ‖/‖W‖ is {_shown(share)}, above {CHANGE_WARNED:g}: the edit outweighs "
                "the model; lower clamp_norm_factor or v_lr, or raise mom2_update_weight"
            )
        if rounds_too_much(rounding):
            said.append(
                f"{name}: {layer.get('dtype', 'its dtype')} rounds off {_percent(rounding)} of Δ, "
                f"above {_percent(ROUNDING_WARNED)}: store the model in a wider dtype"
            )
    return said


def warnings_of_targets(courses: Sequence[tuple[int, Any, Any]]) -> list[str]:
    """A sentence about the targets whose optimisation ended far above its start, if any.

    Args:
        courses: input row, first and last loss of each target.
    """
    astray = [course for course in courses if is_astray(*course[1:])]
    if not astray:
        return []
    worst = sorted(astray, key=lambda course: course[1] - course[2])[:_NAMED]
    named = ", ".join(f"row {row} from {first:.3g} to {last:.3g}" for row, first, last in worst)
    more = f" and {len(astray) - len(worst):,} more" if len(astray) > len(worst) else ""
    return [
        f"{len(astray):,} of {len(courses):,} targets ended with a loss more than {LOSS_WARNED:g} "
        f"above the first one ({named}{more}): the optimisation diverged; lower v_lr or "
        "clamp_norm_factor"
    ]


def weights_of(layers: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The largest ``change`` (‖Δ‖/‖W‖) and ``rounding`` of all layers; None without edited layers.

    Args:
        layers: with ``share`` and ``rounding``.
    """
    return {
        "change": _largest([layer["share"] for layer in layers]),
        "rounding": _largest([layer["rounding"] for layer in layers]),
    }


def _largest(values: Sequence[float]) -> float | None:
    # An undefined value is the worst, and max() would ignore it.
    return max(values, key=lambda value: (not is_number(value), value), default=None)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if is_number(value) else show_special(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %" if is_number(value) else show_special(value)
