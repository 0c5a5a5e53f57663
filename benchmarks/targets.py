"""Targets: the batched form against the plain one, on the same requests in the same run.

python -m benchmarks.targets --count 40
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.harness import arguments, problem, show, timed
from benchmarks.operations import matmul_rate, needed
from pmet.plain import plain_targets
from pmet.targets import Targets, compute_targets

BATCH_SIZES = (1, 8, 64, None)


def main() -> None:
    """Time both forms, and say how far their targets are apart and how far the limit is."""
    parser = arguments(__doc__ or "", count=40)
    parser.add_argument("--dtype", default="float32", help="of the batched form's model")
    options = parser.parse_args()
    given = problem(options)
    requests, hparams, templates = given.requests, given.hparams, given.templates
    what = (given.model, given.tokenizer, requests, hparams)
    count = len(requests)
    rate = matmul_rate(torch.device("cpu"), torch.float32, 2048)
    seconds, plain = timed(lambda: plain_targets(*what, templates))
    operations = needed(*what, templates, plain.steps.tolist())
    rows = [{"form": "plain", "targets/s": count / seconds, "times plain": 1.0}]
    rows[0] |= {"of the limit": f"{operations / rate / seconds:.0%}"}
    rows[0] |= {"equal steps": count, "median difference": 0.0}

    def run(size: int | None) -> Targets:
        return compute_targets(*what, context_templates=templates, batch_size=size)

    given.model.to(getattr(torch, options.dtype))
    for size in BATCH_SIZES:
        taken, fast = timed(lambda size=size: run(size))  # type: ignore[misc]
        relative = (fast.values - plain.values).norm(dim=1) / plain.values.norm(dim=1)
        work = needed(*what, templates, fast.steps.tolist())
        rows.append(
            {
                "form": f"batched, {size or 'auto'}",
                "targets/s": count / taken,
                "times plain": seconds / taken,
                "of the limit": f"{work / rate / taken:.0%}",
                "equal steps": int((fast.steps == plain.steps).sum()),
                "median difference": statistics.median(relative.tolist()),
            }
        )
    show(
        f"{count} targets, {options.threads} thread(s), {options.dtype}",
        rows,
        options,
        f"arithmetic limit {rate * count / operations:.3g} targets/s: "
        f"{operations / count / 1e9:.3g} GFLOP a target, float32 matrix products at "
        f"{rate / 1e9:.3g} GFLOP/s",
    )


if __name__ == "__main__":
    main()
