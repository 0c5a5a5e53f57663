"""The solve of one layer compared with its arithmetic, by default at Llama-3-8B's widths.

python -m benchmarks.solve --key-width 14336 --value-width 4096 --threads 2

The arithmetic of the key form is K³/6 + V·K² multiply-adds (Cholesky and two triangular solves);
the rate is that of a large float64 matrix product, in the same run. Keys and second moments are
random.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import arguments, show, timed
from benchmarks.operations import matmul_rate
from pmet.update import (
    KeyResidualSums,
    cheaper_form,
    moment_factor,
    solve,
    solve_rows_by_requests,
    whitened,
)

WEIGHT = 15_000.0


def main() -> None:
    """Time both forms of the solve."""
    parser = arguments(__doc__ or "", count=1000)
    parser.add_argument("--key-width", type=int, default=14_336)
    parser.add_argument("--value-width", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    k, v, e = options.key_width, options.value_width, options.count
    torch.manual_seed(0)
    rate = matmul_rate(torch.device("cpu"), torch.float64, 2048, seconds=3)
    rows: list[dict[str, Any]] = []

    def add(form: str, seconds: float, multiply_adds: float) -> None:
        wanted = 2 * multiply_adds / rate
        share = f"{wanted / seconds:.0%}"
        rows.append(
            {"form": form, "seconds": seconds, "arithmetic alone": wanted, "of the rate": share}
        )

    moment_KK = _positive_definite(k)
    held, peak = _by_keys(moment_KK, v, add)
    seconds, lower_KK = timed(lambda: moment_factor(moment_KK).lower)
    add("factor of C, once", seconds, k**3 / 6)
    keys_EK = torch.randn(e, k, dtype=torch.float64)
    residuals_EV = torch.randn(e, v, dtype=torch.float64)
    seconds, _ = timed(
        lambda: solve_rows_by_requests(whitened(keys_EK, lower_KK), residuals_EV, lower_KK, WEIGHT)
    )
    work = e * k * k + e * e * k + e**3 / 6 + v * e * (e + k)
    add(f"requests, {e}", seconds, work)
    chosen = cheaper_form(e, k, v, factored=True)
    note = f"float64 matrix products at {rate / 1e9:.3g} GFLOP/s; peak {peak:.3g} GiB with "
    note += f"{held:.3g} GiB of inputs in the key form; chosen for {e} requests: {chosen}"
    show(f"key width {k}, value width {v}, {options.threads} thread(s)", rows, options, note)


def _by_keys(
    moment_KK: torch.Tensor, value_width: int, add: Callable[[str, float, float], None]
) -> tuple[float, float]:
    """Time the key form; return the peak memory before and after, in GiB."""
    k = len(moment_KK)
    sums = KeyResidualSums(
        _positive_definite(k).double(), torch.randn(value_width, k, dtype=torch.float64)
    )
    held = _peak()
    seconds, _ = timed(lambda: solve(sums, moment_KK, WEIGHT, 1.0))
    add("keys", seconds, k**3 / 6 + value_width * k**2)
    return held, _peak()


def _positive_definite(width: int) -> torch.Tensor:
    """Return a positive definite matrix without the cost of a sum of outer products."""
    matrix = torch.randn(width, width).div_(width**0.5)
    matrix = matrix.add_(matrix.T.clone()).div_(8)
    matrix.diagonal().add_(1.0)
    return matrix


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
