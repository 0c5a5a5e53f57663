"""Low-rank factors of a weight change: for each rank, the closest ones there are.

Of all products B·A of a rank, the one made of Δ's largest singular values is closest to Δ in the
Frobenius norm (Eckart and Young 1936). Its squared distance is the sum of the other singular
values' squares, and the *energy* that it keeps is the share of the sum that it has.

The singular vectors are the eigenvectors of ΔΔᵀ, or of ΔᵀΔ if that is smaller: a fifth of the
time of a singular value decomposition of a matrix of 1,024×3,584. Squaring loses singular values
below 1e-8 of the largest one; so the values are not taken from the eigenvalues, but are the lengths
of the rows of UᵀΔ, and what squaring loses is less than float32 can tell apart.

Shape letters: V rows, K columns, S the smaller of the two, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOST = 2.0**-24
"""‖Δ − B·A‖/‖Δ‖ that counts as none when a rank is chosen: the rounding of float32."""


@dataclass(frozen=True)
class LowRank:
    """Two factors whose product is close to Δ, or equal to it but for rounding.

    Attributes:
        left_VR: B. Both factors have the same share of each singular value, so that neither
            overflows in a narrow dtype before the other.
        right_RK: A.
        full_rank: the rank of Δ.
        energy: the share of Δ's squared singular values that the product has.
    """

    left_VR: torch.Tensor
    right_RK: torch.Tensor
    full_rank: int
    energy: float

    @property
    def rank(self) -> int:
        """R."""
        return self.left_VR.shape[1]

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same factors, rounded."""
        return LowRank(self.left_VR.to(dtype), self.right_RK.to(dtype), self.full_rank, self.energy)

    def product(self) -> torch.Tensor:
        """B·A, (V, K), float64."""
        return self.left_VR.double() @ self.right_RK.double()

    def distance(self, delta_VK: torch.Tensor) -> tuple[float, float]:
        """How far the product is from Δ: ‖B·A − Δ‖/‖Δ‖, and max|B·A − Δ|/max|Δ|; zero if Δ is."""
        size, largest = delta_VK.norm(), delta_VK.abs().max()
        if not largest:
            return 0.0, 0.0
        apart = self.product().sub_(delta_VK)
        return (apart.norm() / size).item(), (apart.abs_().max() / largest).item()


def low_rank(
    delta_VK: torch.Tensor, *, rank: int | None = None, energy: float | None = None
) -> LowRank:
    """Factor Δ: as it is, to a rank, or to a share of its energy.

    Args:
        delta_VK: Δ, finite, float64.
        rank: the largest rank, at least 1; None: that of Δ.
        energy: the smallest rank is taken that keeps this share, above 0 and up to 1; None: all.

    Returns:
        Float64 factors. If Δ is zero, their rank is 0.
    """
    if len(delta_VK) > delta_VK.shape[1]:
        flat = low_rank(delta_VK.T, rank=rank, energy=energy)
        return LowRank(flat.right_RK.T, flat.left_VR.T, flat.full_rank, flat.energy)
    largest = delta_VK.abs().max()
    if not largest:
        empty = delta_VK.new_zeros(0)
        return LowRank(empty.reshape(len(delta_VK), 0), empty.reshape(0, delta_VK.shape[1]), 0, 1.0)
    scaled_SK = delta_VK / largest
    basis_SS = torch.linalg.eigh(scaled_SK @ scaled_SK.T)[1]
    rows_SK = basis_SS.T @ scaled_SK
    values_S, order_S = rows_SK.norm(dim=1).sort(descending=True)
    # What each rank loses, from rank 0 on, summed from the smallest value up.
    lost = torch.cat([values_S.square().flip(0).cumsum(0).flip(0), values_S.new_zeros(1)])
    lost /= lost[0].clone()
    full_rank = _first(lost <= LOST**2)
    chosen = full_rank if energy is None else min(full_rank, _first(1 - lost >= energy))
    chosen = max(1, chosen if rank is None else min(chosen, rank))
    roots_R = (values_S[:chosen] * largest).sqrt()
    left_SR = basis_SS[:, order_S[:chosen]] * roots_R
    right_RK = rows_SK[order_S[:chosen]] * (roots_R / values_S[:chosen])[:, None]
    return LowRank(left_SR, right_RK, full_rank, 1 - lost[chosen].item())


def _first(true: torch.Tensor) -> int:
    """The first place where it is true."""
    return int(true.int().argmax())
