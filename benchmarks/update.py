"""The update: keys, residuals and solve of the batched form compared with the plain one.

python -m benchmarks.update --count 200

Both get the same targets (drawn at random around the clean values, which does not matter for an
update) and the second moments of random keys.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Problem, arguments, problem, show, timed
from pmet import compute_edit
from pmet.model import resolve
from pmet.reference import plain_deltas


def main() -> None:
    """Time both forms and report how much their deltas differ."""
    options = arguments(__doc__ or "", count=200).parse_args()
    given = problem(options)
    layout = resolve(given.model, given.hparams)
    generator = torch.Generator().manual_seed(0)
    count, width = len(given.requests), layout.key_width
    targets_EV = torch.randn(count, layout.value_width, generator=generator)
    samples_NK = torch.randn(2 * width, width, generator=generator)
    moment_KK = samples_NK.T @ samples_NK / len(samples_NK)
    moments = dict.fromkeys(given.hparams.layers, moment_KK)
    plain_seconds, plain = timed(lambda: _plain(given, moments, targets_EV))
    rows = [_row("plain", count, plain_seconds, plain_seconds, 0.0)]
    seconds, edit = timed(
        lambda: compute_edit(
            given.model,
            given.tokenizer,
            given.requests,
            given.hparams,
            context_templates=given.templates,
            second_moments=moments,
            targets=targets_EV,
        )
    )
    apart = max(
        ((edit.deltas[name] - delta).norm() / delta.norm()).item() for name, delta in plain.items()
    )
    rows.append(_row("batched", count, seconds, plain_seconds, apart))
    layers = len(given.hparams.layers)
    show(f"{count} requests, {layers} layers, {options.threads} thread(s)", rows, options)


def _plain(given: Problem, moments: dict[int, Any], targets_EV: torch.Tensor) -> Any:
    what = (given.model, given.tokenizer, given.requests, given.hparams, given.templates)
    return plain_deltas(*what, moments, targets_EV)


def _row(form: str, count: int, seconds: float, plain: float, apart: float) -> dict[str, Any]:
    return {
        "form": form,
        "seconds": seconds,
        "requests/s": count / seconds,
        "times plain": plain / seconds,
        "largest difference of a delta": apart,
    }


if __name__ == "__main__":
    main()
