"""Targets: the batched form against the plain one, on the same requests in the same run.

python -m benchmarks.targets --count 40
"""

from __future__ import annotations

import statistics

from benchmarks.harness import arguments, problem, show, timed
from pmet.plain import plain_targets
from pmet.targets import compute_targets

BATCH_SIZES = (1, 8, 64)


def main() -> None:
    """Time both forms, and say how far their targets are apart."""
    options = arguments(__doc__ or "", count=40).parse_args()
    given = problem(options)
    what = (given.model, given.tokenizer, given.requests, given.hparams)
    count = len(given.requests)
    seconds, plain = timed(lambda: plain_targets(*what, given.templates))
    rows = [{"form": "plain", "targets/s": count / seconds, "times plain": 1.0}]
    rows[0] |= {"equal steps": count, "median difference": 0.0}
    for size in BATCH_SIZES:
        taken, fast = timed(
            lambda size=size: compute_targets(
                *what, context_templates=given.templates, batch_size=size
            )
        )
        relative = (fast.values - plain.values).norm(dim=1) / plain.values.norm(dim=1)
        rows.append(
            {
                "form": f"batched, {size}",
                "targets/s": count / taken,
                "times plain": seconds / taken,
                "equal steps": int((fast.steps == plain.steps).sum()),
                "median difference": statistics.median(relative.tolist()),
            }
        )
    show(f"{count} targets", rows, options)


if __name__ == "__main__":
    main()
