"""How many equal shares fit into a whole: workers on CPUs, workers on GPUs."""

from __future__ import annotations


def fit(each: float, into: float) -> int:
    """How many shares of one size fit into a whole."""
    # With some tolerance: 0.1 fits ten times into 1, but not in floating point.
    return int(into / each + 1e-6)


def fit_gpus(each: float, into: float) -> int:
    """How many workers fit: several may share a GPU, but none uses parts of two."""
    return fit(each, into) if each > 1 else int(into) * fit(each, 1.0)
