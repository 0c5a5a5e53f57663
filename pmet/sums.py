"""Sums over requests: all that an update needs of their keys and residuals.

They add up over batches, shards and ranks, so memory does not grow with the number of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class KeyResidualSums:
    """KᵀK (K×K) and RᵀK (V×K) in float64, and how many requests they cover."""

    gram_KK: torch.Tensor
    cross_VK: torch.Tensor
    count: int = 0

    @classmethod
    def zeros(cls, key_width: int, value_width: int, device: torch.device) -> KeyResidualSums:
        """Sums over no requests."""
        return cls(
            torch.zeros(key_width, key_width, dtype=torch.float64, device=device),
            torch.zeros(value_width, key_width, dtype=torch.float64, device=device),
        )

    def add(self, keys_EK: torch.Tensor, residuals_EV: torch.Tensor) -> None:
        """Add some requests, in place."""
        keys, residuals = keys_EK.double(), residuals_EV.double()
        self.gram_KK.addmm_(keys.T, keys)
        self.cross_VK.addmm_(residuals.T, keys)
        self.count += len(keys)
