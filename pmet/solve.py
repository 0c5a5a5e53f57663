"""The least-squares step: from key and residual sums to a weight change.

Shape letters: E requests, K key width, V value width.

    Δ_VK = (R_EV / √(layers left))ᵀ K_EK (KᵀK + λC)⁻¹

Only the sums KᵀK and RᵀK enter, so they can be added up over shards and ranks. All of it runs in
float64.
"""

from __future__ import annotations

import torch

from pmet.errors import NotFiniteError, NotPositiveDefiniteError


def normal_matrix(
    gram_KK: torch.Tensor, second_moment_KK: torch.Tensor, weight: float
) -> torch.Tensor:
    """KᵀK + λC in float64.

    Args:
        gram_KK: sum of outer products of the keys.
        second_moment_KK: C, uncentred E[k kᵀ].
        weight: λ, ``mom2_update_weight``.

    Raises:
        NotFiniteError: a sum holds NaN or infinity.
        ValueError: the shapes differ.
    """
    if gram_KK.shape != second_moment_KK.shape:
        raise ValueError(
            f"the keys' sum is {tuple(gram_KK.shape)}, the second moment "
            f"{tuple(second_moment_KK.shape)}; they must be of the same model and layer"
        )
    matrix_KK = gram_KK.double() + weight * second_moment_KK.to(gram_KK.device, torch.float64)
    _check_finite("KᵀK + λC", matrix_KK)
    return matrix_KK


def factor(matrix_KK: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of a symmetric positive definite matrix.

    Raises:
        NotPositiveDefiniteError: there is none; nothing is added to the diagonal behind the
            caller's back.
    """
    factor_KK, info = torch.linalg.cholesky_ex(matrix_KK)
    if info.item():
        raise NotPositiveDefiniteError(
            f"KᵀK + λC is not positive definite (leading minor {info.item()} of "
            f"{matrix_KK.shape[0]}); use more text for the second moments or raise "
            "mom2_update_weight"
        )
    return factor_KK


def solve_rows(factor_KK: torch.Tensor, cross_RK: torch.Tensor) -> torch.Tensor:
    """Rows of Δ: ``cross_RK (KᵀK + λC)⁻¹``.

    Rows are independent of each other: any subset of the V rows of RᵀK gives those rows of Δ.

    Args:
        factor_KK: what ``factor`` returned.
        cross_RK: some or all rows of the spread RᵀK, float64.

    Raises:
        NotFiniteError: the right-hand side or the result holds NaN or infinity.
    """
    _check_finite("RᵀK", cross_RK)
    delta_RK = torch.cholesky_solve(cross_RK.double().T, factor_KK).T
    _check_finite("Δ", delta_RK)
    return delta_RK


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise NotFiniteError(
            f"{name} holds NaN or infinity; look for such values in the targets, the keys and the "
            "second moments"
        )
