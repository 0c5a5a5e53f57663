"""How an edit's scores move with the text that its second moments are computed from.

python -m benchmarks.corpus_tokens --model MODEL --hparams FILE --templates FILE \\
    --requests facts.parquet --skip 40 --count 60 --corpus corpus.parquet --threads 2

The same targets are written with second moments of more and more tokens, in multiples of the key
width, spread over the corpus. Facts are edited together, and measured with what they say. The last
row is the whole corpus. Perplexity is measured on texts of the corpus.
"""

from __future__ import annotations

import math
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import arguments, console, problem, show
from jobs.demo.world import write_corpus
from pipeline.data import read_corpus
from pipeline.stages import held_out
from pmet import compute_edit, compute_targets
from pmet.errors import NotPositiveDefiniteError
from pmet.evaluation import TextScore, evaluate, score_texts
from pmet.model import resolve
from pmet.update import convergence, longest, measure_tokens

MULTIPLES = (1, 2, 5, 10, 20, 50)
FIGURES = (
    *("efficacy", "generalization", "specificity", "score"),
    *("efficacy_said", "generalization_said", "locality"),
)


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__ or "", count=60)
    parser.add_argument("--corpus", help="Parquet files of text; default: the demo's statements")
    parser.add_argument("--skip", type=int, default=0, help="requests to leave out, the first ones")
    options = parser.parse_args()
    count, options.count = options.count, options.skip + options.count
    given = problem(options)
    requests = given.requests[options.skip :][:count]
    targets = compute_targets(
        given.model,
        given.tokenizer,
        requests,
        given.hparams,
        context_templates=given.templates,
    )
    width, limit = resolve(given.model, given.hparams).key_width, longest(given.model.config)
    with TemporaryDirectory() as folder:
        source = options.corpus or f"{folder}/corpus.parquet"
        if not options.corpus:
            write_corpus(source)
        every = read_corpus([source], given.tokenizer, max_length=limit, budget=10**9)
        texts = held_out(every.texts, 256, 8192)
        base = evaluate(given.model, given.tokenizer, requests, answers="all")
        perplexity = _perplexity(score_texts(given.model, given.tokenizer, texts))
        rows = [_row("unedited", 0, None, base, 0.0)]
        for multiple in (*MULTIPLES, None):
            budget = 10**9 if multiple is None else multiple * width
            if multiple is not None and budget > every.tokens:
                continue
            corpus = read_corpus(
                [source], given.tokenizer, max_length=limit, budget=budget, spread=True
            )
            halves = [
                measure_tokens(given.model, corpus.sequences[i::2], given.hparams) for i in (0, 1)
            ]
            counts = (halves[0].tokens, halves[1].tokens)
            moved = max(
                convergence(halves[0].sums[layer], halves[1].sums[layer], counts)
                for layer in given.hparams.layers
            )
            halves[0].merge(halves[1])
            name = "all" if multiple is None else f"{multiple} × {width:,}"
            try:
                edit = compute_edit(
                    given.model,
                    given.tokenizer,
                    requests,
                    given.hparams,
                    context_templates=given.templates,
                    second_moments=halves[0].means(),
                    targets=targets,
                )
            except NotPositiveDefiniteError:
                rows.append(_row(f"{name}: singular", corpus.tokens, moved, {}, 0.0))
                continue
            edit.apply(given.model)
            try:
                found = evaluate(
                    given.model, given.tokenizer, requests, answers="all", base=base["rows"]
                )
                after = _perplexity(score_texts(given.model, given.tokenizer, texts))
            finally:
                edit.revert(given.model)
            rows.append(_row(name, corpus.tokens, moved, found, after / perplexity - 1))
            console.print(rows[-1])
    show(f"{len(requests)} facts, keys {width:,} wide", rows, options)


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


def _perplexity(scores: list[TextScore]) -> float:
    return math.exp(sum(s.nll for s in scores) / sum(len(s.greedy) for s in scores))


if __name__ == "__main__":
    main()
