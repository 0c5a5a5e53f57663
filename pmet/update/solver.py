"""The least-squares step: from keys and residuals to a weight change.

Shape letters: E requests, K key width, V value width, R rows of Δ.

    Δ_VK = (R_EV / √(layers left))ᵀ K_EK (KᵀK + λC)⁻¹

There are two forms of it, equal in exact arithmetic. The *key form* factors the K×K matrix; it
needs only the sums KᵀK and RᵀK, which add up over shards and ranks, so that memory does not grow
with the number of requests. The *request form* (by the push-through identity)

    Δ_VK = R_EVᵀ (I + K (λC)⁻¹ Kᵀ)⁻¹ K (λC)⁻¹

factors an E×E matrix and C, which stays the same from job to job: cheaper for few requests.
All of it runs in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pmet.errors import NotFiniteError, NotPositiveDefiniteError
from pmet.update.sums import ExpertSums, KeyResidualRows, KeyResidualSums

Form = Literal["keys", "requests"]

JITTERS = (1e-13, 1e-12, 1e-11)
"""Multiples of the mean diagonal element to try if a matrix is positive definite except for
rounding. Much larger ones would change the problem, and are refused."""


def cheaper_form(requests: int, key_width: int, value_width: int, *, factored: bool) -> Form:
    """The form of the solve that needs fewer operations.

    Counts multiply-adds, sums over requests included; ``factored`` if the factor of C exists.
    """
    e, k, v = float(requests), float(key_width), float(value_width)
    by_keys = e * k * k + e * k * v + k**3 / 6 + v * k * k
    by_requests = e * k * k + e * e * k + e**3 / 6 + v * e * (e + k)
    by_requests += 0 if factored else k**3 / 6
    return "requests" if by_requests < by_keys else "keys"


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor.

    Attributes:
        lower: lower triangular, of the matrix with ``jitter`` times its mean diagonal element added
            to the diagonal.
        jitter: 0 if the matrix itself could be factored.
    """

    lower: torch.Tensor
    jitter: float = 0.0


def normal_matrix(
    gram_KK: torch.Tensor, second_moment_KK: torch.Tensor, weight: float
) -> torch.Tensor:
    """KᵀK + λC in float64, overwriting KᵀK.

    Args:
        gram_KK: sum of outer products of the keys, float64; overwritten.
        second_moment_KK: C, uncentred E[k kᵀ].
        weight: λ, ``mom2_update_weight``.

    Raises:
        NotFiniteError: a sum holds NaN or infinity.
        ValueError: the shapes differ.
    """
    if gram_KK.shape != second_moment_KK.shape:
        raise ValueError(
            f"the keys' sum is {tuple(gram_KK.shape)}, the second moment "
            f"{tuple(second_moment_KK.shape)}; they must be from the same model and layer"
        )
    # In pieces: a whole float64 copy of C would be as large as the matrix.
    for sums, moments in zip(gram_KK.split(1024), second_moment_KK.split(1024), strict=True):
        sums.add_(moments.to(sums.device, torch.float64), alpha=weight)
    _check_finite("KᵀK + λC", gram_KK)
    return gram_KK


def factor(matrix: torch.Tensor, name: str = "KᵀK + λC") -> Factor:
    """Lower Cholesky factor of a symmetric positive definite float64 matrix.

    Args:
        matrix: square; its diagonal is changed if a jitter has to be tried.
        name: what the matrix is, for messages.

    Raises:
        NotPositiveDefiniteError: there is none, even with the jitters tried.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not info.item():
        return Factor(lower)
    minor, added = int(info.item()), 0.0
    scale = matrix.diagonal().mean().item()
    for jitter in JITTERS if scale > 0 else ():
        matrix.diagonal().add_((jitter - added) * scale)
        added = jitter
        lower, info = torch.linalg.cholesky_ex(matrix)
        if not info.item():
            return Factor(lower, jitter)
    raise NotPositiveDefiniteError(
        f"{name} is not positive definite (leading minor {minor} of {matrix.shape[0]}), even with "
        f"{JITTERS[-1]:g} of its mean diagonal element added; use more text for the second moments "
        "or raise mom2_update_weight"
    )


def solve_rows(factor_KK: torch.Tensor, cross_RK: torch.Tensor) -> torch.Tensor:
    """Rows of Δ in the key form: ``cross_RK (KᵀK + λC)⁻¹``.

    Rows are independent: any subset of the V rows of RᵀK gives the same rows of Δ.

    Args:
        factor_KK: lower Cholesky factor of KᵀK + λC.
        cross_RK: some or all rows of the spread RᵀK, float64.

    Raises:
        NotFiniteError: the right-hand side or the result holds NaN or infinity.
    """
    _check_finite("RᵀK", cross_RK)
    delta_RK = torch.cholesky_solve(cross_RK.double().T, factor_KK).T
    _check_finite("Δ", delta_RK)
    return delta_RK


def whitened(keys_EK: torch.Tensor, moment_factor_KK: torch.Tensor) -> torch.Tensor:
    """(L⁻¹Kᵀ)ᵀ (E×K) for a lower factor L of C: keys in which C is the identity.

    Requests are independent: each rank can whiten its own.
    """
    _check_finite("K", keys_EK)
    return torch.linalg.solve_triangular(moment_factor_KK, keys_EK.T, upper=False).T


def solve_rows_by_requests(
    whitened_EK: torch.Tensor,
    residuals_ER: torch.Tensor,
    moment_factor_KK: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, float]:
    """Rows of Δ in the request form.

    Args:
        whitened_EK: the whitened keys of all requests.
        residuals_ER: some or all columns of the spread residuals.
        moment_factor_KK: lower Cholesky factor L of C.
        weight: λ.

    Returns:
        ``delta_RK``, and the jitter added to the E×E matrix.

    Raises:
        NotFiniteError: a residual or the result holds NaN or infinity.
    """
    _check_finite("R", residuals_ER)
    matrix_EE = (whitened_EK @ whitened_EK.T).div_(weight)
    matrix_EE.diagonal().add_(1.0)
    found = factor(matrix_EE, "I + K (λC)⁻¹ Kᵀ")
    shares_ER = torch.cholesky_solve(residuals_ER.double(), found.lower)
    # K C⁻¹ = (L⁻ᵀ (L⁻¹ Kᵀ))ᵀ; the R rows are combined first if they are fewer.
    if shares_ER.shape[1] <= len(whitened_EK):
        mixed_KR = whitened_EK.T @ shares_ER
        delta_RK = torch.linalg.solve_triangular(moment_factor_KK.T, mixed_KR, upper=True).T
    else:
        solved_KE = torch.linalg.solve_triangular(moment_factor_KK.T, whitened_EK.T, upper=True)
        delta_RK = shares_ER.T @ solved_KE.T
    delta_RK = delta_RK.div_(weight)
    _check_finite("Δ", delta_RK)
    return delta_RK, found.jitter


def solve(
    collected: KeyResidualSums | KeyResidualRows,
    second_moment_KK: torch.Tensor,
    weight: float,
    share: float,
) -> torch.Tensor:
    """Δ (V×K) from the collected data, in the form it was collected for.

    Args:
        collected: sums for the key form (overwritten), or rows for the request form.
        second_moment_KK: C.
        weight: λ.
        share: the share of the residuals that the layer takes.

    Raises:
        NumericalError: as in the functions above.
    """
    if isinstance(collected, KeyResidualSums):
        matrix_KK = normal_matrix(collected.gram_KK, second_moment_KK, weight)
        return solve_rows(factor(matrix_KK).lower, share * collected.cross_VK)
    lower_KK = moment_factor(second_moment_KK.to(collected.keys_EK.device)).lower
    whitened_EK = whitened(collected.keys_EK, lower_KK)
    return solve_rows_by_requests(whitened_EK, share * collected.residuals_EV, lower_KK, weight)[0]


def solve_experts(
    collected: ExpertSums,
    second_moments_XKK: torch.Tensor,
    weight: float,
    share: float,
    *,
    experts: Sequence[int] | None = None,
) -> Iterator[tuple[int, torch.Tensor, float]]:
    """Δ of each expert that some request is routed to; that of all others is zero.

    Args:
        collected: the sums; those of each expert are overwritten and dropped.
        second_moments_XKK: C by expert.
        weight: λ.
        share: the share of the residuals that the layer takes.
        experts: those to solve for; None: all.

    Yields:
        The expert, its ``delta_VK``, and the jitter added to the factored matrix, in order.

    Raises:
        NumericalError: as in the functions above.
    """
    for expert in sorted(collected.by_expert) if experts is None else experts:
        sums = collected.by_expert.pop(expert)
        name = f"KᵀK + λC of expert {expert}"
        matrix_KK = normal_matrix(sums.gram_KK, second_moments_XKK[expert], weight)
        found = factor(matrix_KK, name)
        yield expert, solve_rows(found.lower, share * sums.cross_VK), found.jitter


def moment_factor(second_moment_KK: torch.Tensor, name: str = "C") -> Factor:
    """Lower Cholesky factor L of C in float64; √λ·L is that of λC.

    Raises:
        NotFiniteError: C holds NaN or infinity.
        NotPositiveDefiniteError: C is not positive definite: it is based on too little text.
    """
    _check_finite(name, second_moment_KK)
    # A jitter would change a float64 C.
    return factor(second_moment_KK.to(torch.float64, copy=True), name)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise NotFiniteError(
            f"{name} holds NaN or infinity; check the targets, the keys and the "
            "second moments for such values"
        )
