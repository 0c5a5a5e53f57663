"""The share of the residual that each edited layer takes.

This is where PMET and MEMIT differ in the update: PMET divides by the square root of the number
of layers left (PMET, section "update"; arXiv 2308.08742), MEMIT by the number itself (arXiv
2210.07229, equation 20).
"""

import math

from pmet.hparams import Spread


def spread_share(index: int, layers: int, spread: Spread) -> float:
    """Share of the remaining residual that the ``index``-th of ``layers`` edited layers takes.

    With n layers left, 1/√n (``sqrt``), 1/n (``linear``) or 1 (``none``). The last layer takes the
    whole remainder.

    Raises:
        ValueError: there is no such layer.
    """
    if not 0 <= index < layers:
        raise ValueError(f"layer index {index} is not within the {layers} edited layers")
    left = layers - index
    return {"sqrt": 1.0 / math.sqrt(left), "linear": 1.0 / left, "none": 1.0}[spread]
