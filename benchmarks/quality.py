"""How an edit's scores move with the options of the update, on the same facts and targets.

python -m benchmarks.quality --model MODEL --hparams FILE --templates FILE \\
    --requests facts.parquet --skip 40 --count 60 --corpus corpus.parquet --threads 2 \\
    --spreads sqrt,linear --weights 600,6000

The first row is the setting of the hyper-parameter file. Each other row changes the spread and λ
(``mom2_update_weight``) alone, so targets and second moments are computed once. The scores in one
number are harmonic means over efficacy, generalization and specificity (probability and strict
form) and over what the model says (efficacy, generalization, locality). Behind each is the 95 %
interval of its distance to the first row, from 2,000 resamples of the facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Problem, applied, console, show, study, study_arguments
from pipeline.second_moments import read_enough
from pmet import PMETHyperParams, Targets, compute_edit, compute_targets
from pmet.evaluation import evaluate, harmonic_mean, weights
from pmet.model import resolve
from pmet.update import longest, measure_tokens

SCORES = {
    "probability": ("efficacy", "generalization", "specificity"),
    "strict": ("efficacy_strict", "generalization_strict", "specificity_strict"),
    "said": ("efficacy_said", "generalization_said", "locality"),
}
RESAMPLES = 2000


def main() -> None:
    """Print the table."""
    options = _options()
    with study(options) as (given, source):
        moments = _moments(given, source)
    what = (given.model, given.tokenizer, given.requests)
    base = evaluate(*what, answers="all")
    targets = compute_targets(*what, given.hparams, context_templates=given.templates)
    first = given.hparams
    settings = [first]
    for spread, weight in product(
        options.spreads.split(","), map(float, options.weights.split(","))
    ):
        changed = first.model_copy(update={"spread": spread, "mom2_update_weight": weight})
        settings += [changed] if changed not in settings else []
    rows, published = [], None
    for hparams in settings:
        found = _edited(given, hparams, moments, targets, base)
        published = published or found
        rows.append(_row(hparams, found, published))
        console.print(rows[-1])
    show(f"{len(given.requests)} facts, the same targets", rows, options)


def _options() -> Any:
    parser = study_arguments(__doc__ or "", count=60)
    parser.add_argument("--spreads", default="sqrt,linear,none", help="spreads to try")
    parser.add_argument("--weights", default="10,100,1000", help="values of λ to try")
    return parser.parse_args()


def _moments(given: Problem, source: str) -> dict[int, torch.Tensor]:
    """The second moments of as much text as a job reads by default."""
    layout, limit = resolve(given.model, given.hparams), longest(given.model.config)
    corpus = read_enough([source], given.tokenizer, layout, max_length=limit, tokens=None)
    return measure_tokens(given.model, corpus.sequences, given.hparams).means()


def _edited(
    given: Problem,
    hparams: PMETHyperParams,
    moments: Mapping[int, torch.Tensor],
    targets: Targets,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """The edited model's figures."""
    edit = compute_edit(
        given.model,
        given.tokenizer,
        given.requests,
        hparams,
        context_templates=given.templates,
        second_moments=moments,
        targets=targets,
    )
    with applied(edit, given.model):
        return evaluate(
            given.model, given.tokenizer, given.requests, answers="all", base=base["rows"]
        )


def _row(
    hparams: PMETHyperParams, found: Mapping[str, Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    row = {"spread": hparams.spread, "λ": f"{hparams.mom2_update_weight:g}"}
    for name, figures in SCORES.items():
        own, others = (_Scored(f["rows"], figures) for f in (found, first))
        row[name] = " / ".join(f"{100 * found[figure]:.1f}" for figure in figures)
        row[f"{name}, mean"] = f"{own.of():.1f}"
        if found is not first:
            low, high = _interval(own, others)
            row[f"{name}, mean"] += f" ({low:+.1f} to {high:+.1f})"
    return row


class _Scored:
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


def _interval(own: _Scored, others: _Scored) -> tuple[float, float]:
    """The 95 % interval of the distance of two scores on the same facts."""
    draw = np.random.default_rng(0)
    drawn = (draw.integers(own.count, size=own.count) for _ in range(RESAMPLES))
    distances = [own.of(facts) - others.of(facts) for facts in drawn]
    low, high = np.percentile(distances, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
