"""How an edit's scores move with the text that its second moments are computed from.

python -m benchmarks.corpus_tokens --model MODEL --hparams FILE --templates FILE \\
    --requests facts.parquet --skip 40 --count 60 --corpus corpus.parquet --threads 2

The same targets are written with second moments of more and more tokens, in multiples of the key
width, spread over the corpus. Facts are edited together, and measured with what they say. The last
row is the whole corpus. Perplexity is measured on texts of the corpus.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Problem, applied, console, show, study, study_arguments
from pipeline.data import Corpus, read_corpus
from pipeline.stages import Measurement, held_out
from pmet import compute_edit, compute_targets
from pmet.errors import NotPositiveDefiniteError
from pmet.evaluation import evaluate, score_texts
from pmet.model import resolve
from pmet.update import convergence, longest, measure_tokens

_EVERY = 10**9
MULTIPLES = (1, 2, 5, 10, 20, 50)
FIGURES = (
    *("efficacy", "generalization", "specificity", "score"),
    *("efficacy_said", "generalization_said", "locality"),
)


def main() -> None:
    """Print the table."""
    options = study_arguments(__doc__ or "", count=60).parse_args()
    with study(options) as (given, source):
        rows = _Study(given, source).rows()
    width = resolve(given.model, given.hparams).key_width
    show(f"{len(given.requests)} facts, keys {width:,} wide", rows, options)


class _Study:
    """The same targets, written with second moments of more and more tokens."""

    def __init__(self, given: Problem, source: str) -> None:
        self._given, self._source = given, source
        self._width = resolve(given.model, given.hparams).key_width
        self._all = self._read(_EVERY, spread=False)
        self._texts = held_out(self._all.texts, 256, 8192)
        self._what = (given.model, given.tokenizer, given.requests)
        self._base = evaluate(*self._what, answers="all")
        self._perplexity = self._measured()

    def rows(self) -> list[dict[str, Any]]:
        """A row for the unedited model, for each multiple, and for the whole corpus."""
        given, rows = self._given, [_row("unedited", 0, None, self._base, 0.0)]
        targets = compute_targets(*self._what, given.hparams, context_templates=given.templates)
        multiples = {f"{m} × {self._width:,}": m * self._width for m in MULTIPLES}
        within = {name: tokens for name, tokens in multiples.items() if tokens <= self._all.tokens}
        for name, budget in (within | {"all": _EVERY}).items():
            corpus = self._read(budget, spread=True)
            moments, moved = self._moments(corpus)
            try:
                edit = compute_edit(
                    *self._what,
                    given.hparams,
                    context_templates=given.templates,
                    second_moments=moments,
                    targets=targets,
                )
            except NotPositiveDefiniteError:
                rows.append(_row(f"{name}: singular", corpus.tokens, moved, {}, 0.0))
                continue
            with applied(edit, given.model):
                found = evaluate(*self._what, answers="all", base=self._base["rows"])
                change = self._measured() / self._perplexity - 1
            rows.append(_row(name, corpus.tokens, moved, found, change))
            console.print(rows[-1])
        return rows

    def _read(self, budget: int, *, spread: bool) -> Corpus:
        limit = longest(self._given.model.config)
        return read_corpus(
            [self._source], self._given.tokenizer, max_length=limit, budget=budget, spread=spread
        )

    def _moments(self, corpus: Corpus) -> tuple[dict[int, torch.Tensor], float]:
        """The second moments, and how much the least certain layer's still changes."""
        given = self._given
        one, other = (
            measure_tokens(given.model, corpus.sequences[i::2], given.hparams) for i in (0, 1)
        )
        counts = (one.tokens, other.tokens)
        moved = max(convergence(one.sums[i], other.sums[i], counts) for i in given.hparams.layers)
        one.merge(other)
        return one.means(), moved

    def _measured(self) -> float:
        scores = score_texts(self._given.model, self._given.tokenizer, self._texts)
        perplexity = Measurement({}, scores).perplexity
        assert perplexity is not None
        return perplexity


def _row(
    name: str, tokens: int, moved: float | None, found: dict[str, Any], change: float
) -> dict[str, Any]:
    shares = {figure: _per_cent(found.get(figure)) for figure in FIGURES}
    still = "" if moved is None else f"{moved:.1%}"
    return {
        "second moments": name,
        "tokens": f"{tokens:,}",
        "still changes by": still,
        **shares,
        "perplexity": f"{change:+.2%}",
    }


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
