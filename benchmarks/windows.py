"""Which layers are the best to edit: every window of neighboring layers, tried on the same facts.

python -m benchmarks.windows --model MODEL --hparams FILE --templates FILE \\
    --requests facts.parquet --corpus corpus.parquet --count 200

All windows of up to as many layers as the hyper-parameter file names are edited with the other
values of that file. Windows with the same last layer share their targets. The score is the harmonic
mean of efficacy, generalization and specificity in the probability form; behind it is the 95 %
interval of its distance to the best one, from 2,000 resamples of the facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import Problem, applied, console, show, study, study_arguments
from benchmarks.quality import SCORES, Scored
from pipeline.evaluation import of_difference
from pipeline.second_moments import read_enough
from pmet import PMETHyperParams, Targets, compute_edit, compute_targets
from pmet.evaluation import evaluate
from pmet.model import resolve
from pmet.update import longest, measure_tokens

_FIGURES = SCORES["probability"]


def main() -> None:
    """Print the table."""
    options = study_arguments(__doc__ or "", count=60).parse_args()
    with study(options) as (given, source):
        depth = resolve(given.model, given.hparams).depth
        moments = _moments(given, source, depth)
    base = evaluate(given.model, given.tokenizer, given.requests, answers=())
    found = {}
    for hparams, targets in _by_last_layer(given, depth):
        for window in _ending_at(hparams.target_layer, len(given.hparams.layers)):
            changed = hparams.model_copy(update={"layers": window})
            found[window] = _figures(given, moments, changed, targets, base)
            console.print(window, [found[window][name] for name in _FIGURES])
    scored = {window: Scored(figures["rows"], _FIGURES) for window, figures in found.items()}
    order = sorted(scored, key=lambda window: scored[window].of(), reverse=True)
    table = [_row(window, found[window], scored[window], scored[order[0]]) for window in order]
    show(f"{len(given.requests)} facts", table, options)


def _moments(given: Problem, source: str, depth: int) -> dict[int, torch.Tensor]:
    """The second moments of all layers, over as much text as a job reads by default."""
    every = given.hparams.model_copy(update={"layers": tuple(range(depth))})
    layout, limit = resolve(given.model, every), longest(given.model.config)
    corpus = read_enough([source], given.tokenizer, layout, max_length=limit, tokens=None)
    return measure_tokens(given.model, corpus.sequences, every).means()


def _by_last_layer(given: Problem, depth: int) -> Iterator[tuple[PMETHyperParams, Targets]]:
    for last in range(depth):
        hparams = given.hparams.model_copy(update={"layers": (last,)})
        targets = compute_targets(
            given.model,
            given.tokenizer,
            given.requests,
            hparams,
            context_templates=given.templates,
        )
        yield hparams, targets


def _ending_at(last: int, width: int) -> Iterator[tuple[int, ...]]:
    """The windows of up to ``width`` layers that end at a layer."""
    for first in range(max(0, last - width + 1), last + 1):
        yield tuple(range(first, last + 1))


def _figures(
    given: Problem,
    moments: dict[int, torch.Tensor],
    hparams: PMETHyperParams,
    targets: Targets,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of the model with the edit of one window."""
    what = (given.model, given.tokenizer, given.requests)
    edit = compute_edit(
        *what,
        hparams,
        context_templates=given.templates,
        second_moments={layer: moments[layer] for layer in hparams.layers},
        targets=targets,
    )
    with applied(edit, given.model):
        return evaluate(*what, answers=(), base=base["rows"])


def _row(
    window: Sequence[int], figures: Mapping[str, Any], own: Scored, best: Scored
) -> dict[str, Any]:
    row = {
        "layers": ", ".join(map(str, window)),
        "efficacy / generalization / specificity": " / ".join(
            f"{100 * figures[name]:.1f}" for name in _FIGURES
        ),
        "mean": f"{own.of():.1f}",
        "distance to the best": "",
    }
    if own is not best:
        low, high = of_difference(own.count, own.of, best.of)
        row["distance to the best"] = f"{low:+.1f} to {high:+.1f}"
    return row


if __name__ == "__main__":
    main()
