"""The share of the residual that each edited layer takes.

This is where PMET and MEMIT differ in the update: PMET divides by the square root of the number
of layers left (PMET, section "update"; arXiv 2308.08742), MEMIT by the number itself.
"""

import math


def square_root_spread(index: int, layers: int) -> float:
    """Share of the ``index``-th of ``layers`` edited layers: 1/√(layers left).

    The last layer takes the whole remainder.
    """
    if not 0 <= index < layers:
        raise ValueError(f"layer index {index} is not within the {layers} edited layers")
    return 1.0 / math.sqrt(layers - index)
