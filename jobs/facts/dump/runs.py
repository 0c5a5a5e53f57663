"""Numbers rows within consecutive runs, vectorised."""

from __future__ import annotations

import numpy as np


def places_in_runs(counts: np.ndarray) -> np.ndarray:
    """Return 0 to ``counts[i] - 1`` for each run in turn: each row's position in its run.

    Args:
        counts: (runs,) number of rows in each run.
    """
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
