"""Runs of rows that lie one after the other, counted without touching a row by itself."""

from __future__ import annotations

import numpy as np


def places_in_runs(counts: np.ndarray) -> np.ndarray:
    """0 to ``counts[i] - 1`` for each run in turn: the place of every row in its run.

    Args:
        counts: (runs,) rows of each.
    """
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
