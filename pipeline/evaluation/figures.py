"""The names, meanings and formats of a model's figures.

The report, the comparison, the model card, trackers and the terminal all use them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from pipeline.job import GATES, ROUNDING, TASK_DROP, Gate, Kind

Unit = Literal["fraction", "bits", "plain"]


@dataclass(frozen=True)
class Figure:
    """One figure of a model.

    Attributes:
        name: in ``metrics.json``.
        meaning: one line.
        unit: ``fraction`` of prompts or tokens, ``bits``, or ``plain`` for a bare number.
    """

    name: str
    meaning: str
    unit: Unit = "fraction"

    @property
    def label(self) -> str:
        """The figure's displayed name."""
        if self.name.endswith("_said"):
            return f"{self.name.removesuffix('_said')} (said)"
        for form in ("strict", "accuracy"):
            if self.name.endswith(f"_{form}"):
                return f"{self.name.removesuffix(f'_{form}').replace('_', ' ')} ({form})"
        return self.name.replace("_", " ")


def _forms(
    name: str, prompts: str, wanted: str, other: str, note: str = ""
) -> tuple[Figure, Figure, Figure]:
    """A figure in the probability form, the strict form, and as token accuracy."""
    return (
        Figure(name, f"Share of {prompts} where {wanted} is more probable than {other}.{note}"),
        Figure(f"{name}_strict", f"Share of {prompts} that the model answers greedily as wanted."),
        Figure(
            f"{name}_accuracy",
            f"Share of the wanted tokens that are the most probable ones, over {prompts}.",
        ),
    )


_EFFICACY = _forms("efficacy", "edited prompts", "the new target", "the true one")
_GENERALIZATION = _forms("generalization", "paraphrases", "the new target", "the true one")
_SPECIFICITY = _forms(
    *("specificity", "neighboring prompts", "the true target", "the new one"),
    note=" They should not change.",
)
_PORTABILITY = _forms(
    *("portability", "prompts about what follows from the fact", "their answer"),
    "the answer that was true before",
)
_SAID = (
    Figure("efficacy_said", "Share of edited prompts whose answer states the new target."),
    Figure("generalization_said", "Share of paraphrases whose answer states the new target."),
    Figure("chat_said", "Share of questions in chat whose answer states the new target."),
    Figure("locality", "Share of neighboring prompts whose answer is the base model's."),
    Figure("locality_unrelated", "The same share of prompts about general knowledge."),
    Figure("old_said", "Share of edited prompts whose answer states the true target; best low."),
    Figure(
        "run_on",
        "Share of edited prompts whose answer states the new target and does not end; best low.",
    ),
)
_ALL = (
    *_SAID,
    *(form[0] for form in (_EFFICACY, _GENERALIZATION, _SPECIFICITY)),
    Figure("score", "Harmonic mean of efficacy, generalization and specificity."),
    *(form[1] for form in (_EFFICACY, _GENERALIZATION, _SPECIFICITY)),
    *(form[2] for form in (_EFFICACY, _GENERALIZATION, _SPECIFICITY)),
    *_PORTABILITY,
    Figure(
        "agreement",
        "Share of held-out positions where base and edited model predict the same token.",
    ),
    Figure("harness", "Mean of the main metrics of the tasks of lm-evaluation-harness."),
    Figure("consistency", "Similarity of generated and reference texts: cosine of TF-IDF vectors."),
    Figure(
        "fluency",
        "Entropy of word pairs and triples in generated text; low for repetitive text.",
        "bits",
    ),
    Figure("perplexity", "On held-out texts of the corpus; lower is better.", "plain"),
)
FIGURES: dict[str, Figure] = {figure.name: figure for figure in _ALL}
CORE = ("efficacy", "generalization", "specificity")
ALWAYS = (*CORE, "score", *(f"{name}_strict" for name in CORE), "perplexity")
"""The figures that are listed even if they were not measured."""


_OF_GATES = {
    ROUNDING: Figure(ROUNDING, "Share of Δ that the stored dtype rounds off, in the worst layer."),
    TASK_DROP: Figure(TASK_DROP, "Drop in the worst task of lm-evaluation-harness."),
}
"""Figures that only gates use."""


def figure_of(name: str) -> Figure:
    """The figure with this name; an unknown one is a plain number without a meaning."""
    return FIGURES.get(name) or _OF_GATES.get(name) or Figure(name, "", "plain")


def duration(seconds: Any) -> str:
    """A number of seconds as readable text; a dash if there is none."""
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_figure(value: Any) -> TypeGuard[float]:
    """Whether a value is a figure at all: a number, which may be infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show_special(value: Any) -> str:
    """The text for a value that cannot be shown as a number; a dash if there is none."""
    if not is_figure(value):
        return "–"
    if math.isnan(value):
        return "undefined"
    return "∞" if value > 0 else "−∞"


def measured(*scores: Mapping[str, Any], always: Sequence[str] = ()) -> list[Figure]:
    """The figures that any of these scores has, in display order.

    Args:
        scores: values by name.
        always: names of figures that are listed in any case.
    """
    held = {name for values in scores for name, value in values.items() if is_figure(value)}
    names = [name for name in FIGURES if name in held or name in always]
    return [figure_of(name) for name in (*names, *sorted(held - FIGURES.keys()))]


def is_fraction(name: str) -> bool:
    """Whether a figure is a fraction from 0 to 1, which a chart draws on a shared axis."""
    return figure_of(name).unit == "fraction"


def show(value: Any, name: str) -> str:
    """A figure's value in its unit; a dash if it was not measured."""
    if not is_number(value):
        return show_special(value)
    match figure_of(name).unit:
        case "fraction":
            return f"{100 * value:.1f} %"
        case "bits":
            return f"{value:.2f} bits"
        case _:
            return f"{value:,.4g}"


def show_interval(interval: Any, name: str) -> str:
    """The ends of a confidence interval; empty if there is none."""
    if not (isinstance(interval, list | tuple) and len(interval) == 2 and all_numbers(interval)):
        return ""
    low, high = interval
    if figure_of(name).unit == "fraction":
        return f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{low:.4g} to {high:.4g}"


def all_numbers(values: Iterable[Any]) -> bool:
    """Whether all of these are numbers that can be shown."""
    return all(is_number(value) for value in values)


def show_change(after: Any, before: Any, name: str) -> str:
    """The difference of two values: in points for a fraction, relative for the perplexity."""
    if not (is_number(after) and is_number(before)):
        return "–"
    match figure_of(name).unit:
        case "fraction":
            text = f"{100 * (after - before):+.1f} points"
        case "bits":
            text = f"{after - before:+.2f} bits"
        case _ if name == "perplexity" and before:
            text = f"{100 * (after / before - 1):+.2f} %"
        case _:
            text = f"{after - before:+.4g}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class TaskText:
    """A task of lm-evaluation-harness in ``metrics.json`` as text; a dash where there is no base.

    Attributes:
        name: of the task.
        metric: its main metric.
        higher_is_better: whether that is so for this metric.
        documents: their number.
        examples: in front of each question.
        before: the base model's value.
        after: the edited model's value.
        change: their difference.
        interval: its 95 % interval, or that of the only model; empty if there is none.
    """

    name: str
    metric: str
    higher_is_better: bool
    documents: int
    examples: int
    before: str
    after: str
    change: str
    interval: str


def show_tasks(metrics: Mapping[str, Any]) -> list[TaskText]:
    """Describe the tasks of lm-evaluation-harness in ``metrics.json``; none without them."""
    return [_task_text(row) for row in (metrics.get("harness") or {}).get("tasks", ())]


def _task_text(row: Mapping[str, Any]) -> TaskText:
    # A metric outside of 0 to 1, such as a perplexity, is a plain number.
    values = [row.get(when) for when in ("before", "after")]
    plain = not row["higher_is_better"] or any(is_number(v) and not 0 <= v <= 1 for v in values)
    kind = "" if plain else "harness"
    ends = row.get("interval") if all_numbers(row.get("interval") or ()) else None
    sign = "+" if "before" in row else ""
    shown = [f"{end:{sign}.4g}" if plain else f"{100 * end:{sign}.1f}" for end in ends or ()]
    return TaskText(
        name=str(row["name"]),
        metric=str(row["metric"]),
        higher_is_better=bool(row["higher_is_better"]),
        documents=int(row["documents"]),
        examples=int(row["num_fewshot"]),
        before=show(values[0], kind),
        after=show(values[1], kind),
        change=show_change(values[1], values[0], kind),
        interval=" to ".join(shown).replace("-", "−"),
    )


@dataclass(frozen=True)
class GateText:
    """A gate of ``metrics.json`` as text.

    Attributes:
        name: the gate's name.
        figure: the figure that it checks.
        kind: how it checks it.
        asked: its requirement.
        reached: the value it saw.
        passed: whether the model passes it.
    """

    name: str
    figure: str
    kind: Kind
    asked: str
    reached: str
    passed: bool


def read_gate(gate: Mapping[str, Any]) -> GateText:
    """Describe a gate of ``metrics.json``, of any kind."""
    # Runs before the name was one called it ``metric``.
    name = str(gate["name"] if "name" in gate else gate["metric"])
    known = GATES.get(name, Gate(name, "least"))
    figure, kind = known.figure, known.kind
    threshold, value = gate["threshold"], gate["value"]
    match kind:
        case "increase":
            asked, reached = f"at most {100 * threshold:.1f} % over the base", _relative(value)
        case "most" if figure == TASK_DROP:
            asked = f"at most {_distance(threshold, figure)} below the base in any task"
            reached = _drop(value, figure)
        case "most":
            asked, reached = f"at most {show(threshold, figure)}", show(value, figure)
        case "drop":
            asked = f"at most {_distance(threshold, figure)} below the base"
            reached = _drop(value, figure)
        case "drop_since_last":
            asked = f"at most {_distance(threshold, figure)} below the last run"
            reached = _drop(value, figure)
        case _:
            asked, reached = f"at least {show(threshold, figure)}", show(value, figure)
    if gate.get("note"):
        reached = str(gate["note"])
    return GateText(name, figure, kind, asked, reached, bool(gate["passed"]))


def _relative(value: Any) -> str:
    return f"{100 * value:+.1f} %".replace("-", "−") if is_number(value) else "–"


def _distance(value: Any, figure: str) -> str:
    """A difference without its sign."""
    if not is_number(value):
        return "–"
    match figure_of(figure).unit:
        case "fraction":
            return f"{100 * value:.1f} points"
        case "bits":
            return f"{value:.2f} bits"
        case _:
            return f"{value:,.4g}"


def _drop(value: Any, figure: str) -> str:
    """How far a figure fell; a rise is described as one."""
    if not is_number(value):
        return "–"
    return f"{_distance(abs(value), figure)} {'above' if value < 0 else 'below'}"
