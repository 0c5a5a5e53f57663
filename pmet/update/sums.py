"""The data that a layer's update needs: sums over its requests, or their rows if they are few.

Sums add up over batches, shards and ranks, and their size does not depend on the number of
requests. Rows are kept for the form of the solve that factors an E×E matrix
(``pmet.update.solver``).

Shape letters: E requests, K key width, V value width.
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


@dataclass
class KeyResidualRows:
    """K (E×K) and R (E×V) in float64, of fewer requests than K."""

    keys_EK: torch.Tensor
    residuals_EV: torch.Tensor
    count: int = 0

    @classmethod
    def room(
        cls, requests: int, key_width: int, value_width: int, device: torch.device
    ) -> KeyResidualRows:
        """Space for ``requests`` rows, still empty."""
        return cls(
            torch.zeros(requests, key_width, dtype=torch.float64, device=device),
            torch.zeros(requests, value_width, dtype=torch.float64, device=device),
        )

    def add(self, keys_EK: torch.Tensor, residuals_EV: torch.Tensor) -> None:
        """Append the rows of some requests."""
        place = slice(self.count, self.count + len(keys_EK))
        self.keys_EK[place] = keys_EK
        self.residuals_EV[place] = residuals_EV
        self.count += len(keys_EK)
