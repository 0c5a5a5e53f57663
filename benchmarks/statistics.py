"""Second moments: one pass for all layers compared with plain passes, and three layers with one.

python -m benchmarks.statistics --model DIR --hparams FILE --corpus FILE --tokens 50000

The plain form runs one text at a time through the whole model, once for each layer, and adds k kᵀ
in float64. Passes take turns on small parts of the text, and the fastest round of each part counts:
other load only ever adds time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Problem, arguments, problem, show, timed
from pipeline.data import read_corpus
from pmet.hparams import PMETHyperParams
from pmet.model import batches_by_tokens, captured_input, resolve
from pmet.update import BATCH_TOKENS, SecondMoments, longest, measure_tokens

Sequences = Sequence[Sequence[int]]
Pass = Callable[[Sequences], SecondMoments]
GOLDEN_TEXTS = Path(__file__).parent.parent / "tests" / "golden" / "corpus.json"


def main() -> None:
    """Time the passes and report how much their second moments differ."""
    parser = arguments(__doc__ or "", count=0)
    parser.add_argument("--corpus", help="Parquet file of texts; default: tests/golden's")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--top", type=int, help="the highest layer; default: the hparams'")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    given = problem(options)
    sequences = _sequences(options, given)
    tokens = sum(map(len, sequences))
    top = given.hparams.target_layer if options.top is None else options.top
    one, three = (_editing(given.hparams, layers) for layers in ((top,), _three(top)))
    passes: dict[str, Pass] = {
        "one layer": lambda part: measure_tokens(given.model, part, one),
        "three layers": lambda part: measure_tokens(given.model, part, three),
        "one layer, plain": lambda part: plain(given.model, part, one),
        "three layers, plain": lambda part: plain(given.model, part, three),
    }
    seconds, found = _fastest(passes, sequences, options.rounds)
    rows = [
        {
            "pass": name,
            "tokens/s": tokens / seconds[name],
            "times one layer": seconds[name] / seconds["one layer"],
            "apart from plain": _apart(
                found[name], found[f"{name.removesuffix(', plain')}, plain"]
            ),
        }
        for name in passes
    ]
    shown = ", ".join(map(str, three.layers))
    show(
        f"Second moments of {tokens:,} tokens, layer {top} and layers {shown}, keys "
        f"{resolve(given.model, given.hparams).key_width} wide",
        rows,
        options,
    )


@torch.no_grad()
def plain(model: Any, sequences: Sequences, hparams: PMETHyperParams) -> SecondMoments:
    """Run one text at a time, through the whole model for each layer."""
    layout, sums = resolve(model, hparams), dict[int, torch.Tensor]()
    for layer in hparams.layers:
        with captured_input(layout.down_projection(model, layer)) as seen:
            total = torch.zeros(layout.key_width, layout.key_width, dtype=torch.float64)
            for sequence in sequences:
                model(input_ids=torch.tensor([list(sequence)]))
                keys = seen.tensor[0].double()
                total.addmm_(keys.T, keys)
            sums[layer] = total
    return SecondMoments(sums, sum(map(len, sequences)))


def _sequences(options: argparse.Namespace, given: Problem) -> Sequences:
    limit = longest(given.model.config)
    if options.corpus:
        corpus = read_corpus(
            [options.corpus], given.tokenizer, max_length=limit, budget=options.tokens
        )
        return corpus.sequences
    texts = json.loads(GOLDEN_TEXTS.read_text())
    return [given.tokenizer(text)["input_ids"][:limit] for text in texts]


def _three(top: int) -> tuple[int, ...]:
    return tuple(range(max(0, top - 2), top + 1))


def _editing(hparams: PMETHyperParams, layers: tuple[int, ...]) -> PMETHyperParams:
    return hparams.model_copy(update={"layers": layers})


def _fastest(
    passes: dict[str, Pass], sequences: Sequences, rounds: int
) -> tuple[dict[str, float], dict[str, SecondMoments]]:
    """Return the seconds and the sums of each pass, added up over parts of the text."""
    seconds = dict.fromkeys(passes, 0.0)
    found = {name: SecondMoments({}) for name in passes}
    # Sorted by length, as a pass reads them: a part is a batch.
    for part in batches_by_tokens(sorted(sequences, key=len), BATCH_TOKENS, len):
        taken: dict[str, list[float]] = {name: [] for name in passes}
        for round_ in range(rounds):
            for name, work in passes.items():
                # The plain form is far slower, so one round is precise enough.
                if round_ == 0 or "plain" not in name:
                    took, moments = timed(lambda work=work, part=part: work(part))  # type: ignore[misc]
                    taken[name].append(took)
                    if round_ == 0:
                        found[name].merge(moments)
        for name, times in taken.items():
            seconds[name] += min(times)
    return seconds, found


def _apart(one: SecondMoments, other: SecondMoments) -> float:
    """Return the largest relative distance of a layer's second moments."""
    means = other.means()
    return max(
        float((mean - means[layer]).norm() / means[layer].norm())
        for layer, mean in one.means().items()
    )


if __name__ == "__main__":
    main()
