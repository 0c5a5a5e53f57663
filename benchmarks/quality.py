"""How an edit's scores move with the options of the method, on the same facts.

python -m benchmarks.quality --model MODEL --hparams FILE --templates FILE \\
    --requests facts.parquet --skip 40 --count 60 --corpus corpus.parquet --threads 2 \\
    --spreads sqrt,linear --weights 600,6000 --solves 1,2 --others tuned.json

The first row is the setting of the hyper-parameter file. The next ones change the spread, λ
(``mom2_update_weight``) and the number of solves alone, so they share its targets. Each file of
``--others`` is a row of its own. The scores in one number are harmonic means over efficacy,
generalization and specificity (probability and strict form) and over what the model says
(efficacy, generalization, locality). Behind each is the 95 % interval of its distance to the first
row, from 2,000 resamples of the facts. Evaluations are those of the loss, the mean over targets;
the seconds are those of the targets and of the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.harness import Problem, applied, console, show, study, study_arguments, timed
from jobs.tune.trials import PROBABILITY, SAID, STRICT
from pipeline.evaluation import of_difference
from pipeline.second_moments import read_enough
from pmet import PMETHyperParams, Targets, compute_edit, compute_targets
from pmet.evaluation import evaluate, harmonic_mean, weights
from pmet.model import resolve
from pmet.update import longest, measure_tokens

SCORES = {
    "probability": PROBABILITY,
    "strict": STRICT,
    "said": SAID,
}


def main() -> None:
    """Print the table."""
    options = _options()
    with study(options) as (given, source):
        moments = moments_of(given, source)
    answers: Literal["all"] | tuple[int, ...] = () if options.silent else "all"
    base = evaluate(given.model, given.tokenizer, given.requests, answers=answers)
    first = given.hparams
    settings = [first, *_varied(first, options)]
    settings += [PMETHyperParams.from_file(path) for path in options.others]
    trial = _Trial(given, moments, base, answers)
    rows, published = [], None
    for hparams in settings:
        found, seconds = trial.of(hparams)
        published = published or found
        rows.append(_row(hparams, found, published) | seconds)
        console.print(rows[-1])
    show(f"{len(given.requests)} facts", rows, options)


def _varied(first: PMETHyperParams, options: Any) -> Iterator[PMETHyperParams]:
    """The hyper-parameters with other options of the update."""
    values = product(options.spreads, map(float, options.weights), map(int, options.solves))
    for spread, weight, solves in values:
        update = {
            "spread": spread,
            "mom2_update_weight": weight,
            "mom2_update_share": None,
            "solves": solves,
        }
        if (changed := first.model_copy(update=update)) != first:
            yield changed


def _options() -> Any:
    parser = study_arguments(__doc__ or "", count=60)
    parser.add_argument("--spreads", type=_listed, default="sqrt,linear,none")
    parser.add_argument("--weights", type=_listed, default="10,100,1000", help="values of λ")
    parser.add_argument("--solves", type=_listed, default="1", help="numbers of solves")
    parser.add_argument("--others", type=_listed, default="", help="hyper-parameter files")
    parser.add_argument("--silent", action="store_true", help="leave out what the model says")
    return parser.parse_args()


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def moments_of(given: Problem, source: str) -> dict[int, torch.Tensor]:
    """The second moments of as much text as a job reads by default."""
    layout, limit = resolve(given.model, given.hparams), longest(given.model.config)
    corpus = read_enough([source], given.tokenizer, layout, max_length=limit, tokens=None)
    return measure_tokens(given.model, corpus.sequences, given.hparams).means()


class _Trial:
    """Edits of the same facts with different hyper-parameters.

    Args:
        given: the model and the facts.
        moments: the second moments of all layers that are edited.
        base: the base model's figures.
        answers: as for `evaluate`.
    """

    def __init__(
        self,
        given: Problem,
        moments: Mapping[int, torch.Tensor],
        base: Mapping[str, Any],
        answers: Literal["all"] | tuple[int, ...],
    ) -> None:
        self._given, self._moments, self._base, self._answers = given, moments, base, answers
        self._targets: dict[PMETHyperParams, tuple[float, Targets]] = {}

    def of(self, hparams: PMETHyperParams) -> tuple[dict[str, Any], dict[str, str]]:
        """The edited model's figures, and what targets and update cost."""
        what = (self._given.model, self._given.tokenizer, self._given.requests)
        templates = self._given.templates
        # The options of the update change no target.
        update = {"spread": "sqrt", "mom2_update_weight": 1.0, "solves": 1}
        alike = hparams.model_copy(update={**update, "mom2_update_share": None})
        if alike not in self._targets:
            self._targets[alike] = timed(
                lambda: compute_targets(*what, hparams, context_templates=templates)
            )
        seconds, targets = self._targets[alike]
        updating, edit = timed(
            lambda: compute_edit(
                *what,
                hparams,
                context_templates=templates,
                second_moments=self._moments,
                targets=targets,
            )
        )
        with applied(edit, self._given.model):
            figures = evaluate(*what, answers=self._answers, base=self._base["rows"])
        cost = {
            "evaluations": f"{targets.steps.double().mean():.1f}",
            "targets, s": f"{seconds:.0f}",
            "update, s": f"{updating:.1f}",
        }
        return figures, cost


def _row(
    hparams: PMETHyperParams, found: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    row = {
        "clamp": f"{hparams.clamp_norm_factor:g}",
        "rate": f"{hparams.v_lr:g}",
        "spread": hparams.spread,
        "λ": f"{hparams.mom2_update_weight:g}"
        if hparams.mom2_update_share is None
        else f"share {hparams.mom2_update_share:g}",
        "solves": str(hparams.solves),
    }
    for name, figures in SCORES.items():
        if found[figures[0]] is None:
            continue
        own, others = (Scored(f["rows"], figures) for f in (found, first))
        row[name] = " / ".join(f"{100 * found[figure]:.1f}" for figure in figures)
        row[f"{name}, mean"] = f"{own.of():.1f}"
        if found is not first:
            low, high = of_difference(own.count, own.of, others.of)
            row[f"{name}, mean"] += f" ({low:+.1f} to {high:+.1f})"
    return row


class Scored:
    """The figures of facts, as they count in a score.

    Args:
        rows: figures by fact.
        figures: those that the score is the harmonic mean of.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
        self._weights = np.array([weights(rows, figure) for figure in figures])
        self._values = np.array([[row.get(f) or 0.0 for row in rows] for f in figures])
        self.count = len(rows)

    def of(self, facts: Any = slice(None)) -> float:
        """The score of some of the facts, in per cent."""
        counts = self._weights[:, facts]
        means = (self._values[:, facts] * counts).sum(1) / counts.sum(1)
        return 100 * (harmonic_mean(means.tolist()) or 0.0)


if __name__ == "__main__":
    main()
