"""The data that a layer's update needs: sums over its requests, or their rows if they are few.

Sums add up over batches, shards and ranks, and their size does not depend on the number of
requests. Rows are kept for the form of the solve that factors an E×E matrix
(``pmet.update.solver``).

Shape letters: E requests, K key width, V value width; X experts, P pairs of a request and an expert
that it is routed to, Q those of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pmet.model import RoutedKeys
from pmet.update.weight import KeyPower


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

    @property
    def power(self) -> KeyPower:
        """The size of the keys."""
        return KeyPower(self.gram_KK.trace().item(), self.count)


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

    @property
    def power(self) -> KeyPower:
        """The size of the keys."""
        return KeyPower(self.keys_EK.square().sum().item(), self.count)


@dataclass
class ExpertSums:
    """`KeyResidualSums` of each expert that some request is routed to, and the requests' number.

    A request's residual is shared out among the experts that it is routed to. With shares s_i that
    add up to 1, what they leave of it is bounded (Jensen's inequality) by

        ‖r − Σ_i Δ_i κ_i‖² ≤ Σ_i s_i ‖r − Δ_i κ_i / s_i‖²        (κ_i = g_i k_i)

    where every expert stands alone: its sums are those of keys κ_i / √s_i and residuals √s_i r.
    The shares are s_i = ‖κ_i‖² / Σ_j ‖κ_j‖², which make all keys of a request as long as that of
    the whole FFN (docs/method.md).

    Attributes:
        widths: K and V.
        device: where the sums are.
        by_expert: the sums by expert.
        count: E.
        squares: sum of the squared norms of the requests' keys, Σ ‖κ_i‖².
    """

    widths: tuple[int, int]
    device: torch.device
    by_expert: dict[int, KeyResidualSums] = field(default_factory=dict)
    count: int = 0
    squares: float = 0.0

    def add(self, keys: RoutedKeys, residuals_EV: torch.Tensor) -> None:
        """Add some requests, in place."""
        self.count += len(residuals_EV)
        self.squares += keys.keys_PK.double().square().sum().item()
        roots_P = _shares(keys, len(residuals_EV)).sqrt()
        # A key of zero asks for nothing, and its share is none. NaN stays, for the solve to refuse.
        asking_P = roots_P != 0
        for expert in keys.experts_P[asking_P].unique().tolist():
            here_Q = ((keys.experts_P == expert) & asking_P).nonzero()[:, 0]
            roots_Q1 = roots_P[here_Q, None]
            residuals_QV = residuals_EV.double()[keys.rows_P[here_Q]]
            self.of(expert).add(keys.keys_PK[here_Q] / roots_Q1, roots_Q1 * residuals_QV)

    @property
    def power(self) -> KeyPower:
        """The size of the requests' keys, those of all experts side by side."""
        return KeyPower(self.squares, self.count)

    def of(self, expert: int) -> KeyResidualSums:
        """An expert's sums, which are made if no request has been routed to it yet."""
        if expert not in self.by_expert:
            self.by_expert[expert] = KeyResidualSums.zeros(*self.widths, self.device)
        return self.by_expert[expert]


def _shares(keys: RoutedKeys, count: int) -> torch.Tensor:
    sizes_P = keys.keys_PK.double().square().sum(1)
    totals_E = sizes_P.new_zeros(count).index_add_(0, keys.rows_P, sizes_P)
    totals_P = totals_E[keys.rows_P]
    return torch.where(totals_P == 0, 0.0, sizes_P / totals_P)
