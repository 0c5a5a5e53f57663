"""The least-squares step compared with plain algebra, and its named failures."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmet.errors import NotFiniteError, NotPositiveDefiniteError
from pmet.hparams import Spread
from pmet.model.experts import RoutedKeys
from pmet.update.solver import (
    cheaper_form,
    factor,
    moment_factor,
    normal_matrix,
    solve,
    solve_experts,
    solve_rows,
)
from pmet.update.spread import spread_share
from pmet.update.sums import ExpertSums, KeyResidualRows, KeyResidualSums

sizes = st.integers(1, 12)


def problem(
    requests: int, keys: int, values: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    root_KK = draw(2 * keys, keys)
    return draw(requests, keys), draw(requests, values), root_KK.T @ root_KK / (2 * keys)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 2**20), st.floats(0.1, 1e4))
def test_the_solve_is_the_textbook_formula(
    requests: int, keys: int, values: int, seed: int, weight: float
) -> None:
    keys_EK, residuals_EV, moment_KK = problem(requests, keys, values, seed)
    sums = KeyResidualSums.zeros(keys, values, torch.device("cpu"))
    sums.add(keys_EK, residuals_EV)
    matrix_KK = normal_matrix(sums.gram_KK, moment_KK, weight)
    delta_VK = solve_rows(factor(matrix_KK).lower, sums.cross_VK)
    plain_VK = residuals_EV.T @ keys_EK @ torch.inverse(keys_EK.T @ keys_EK + weight * moment_KK)
    # Float64 both times; the inverse loses digits with the condition number.
    torch.testing.assert_close(delta_VK, plain_VK, rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 2**20), st.floats(0.1, 1e4))
def test_both_forms_of_the_solve_agree(
    requests: int, keys: int, values: int, seed: int, weight: float
) -> None:
    keys_EK, residuals_EV, moment_KK = problem(requests, keys, values, seed)
    sums = KeyResidualSums.zeros(keys, values, torch.device("cpu"))
    rows = KeyResidualRows.room(requests, keys, values, torch.device("cpu"))
    cut = requests // 2
    for part in (slice(0, cut), slice(cut, requests)):
        sums.add(keys_EK[part], residuals_EV[part])
        rows.add(keys_EK[part], residuals_EV[part])
    one, other = (solve(c, moment_KK, weight, 0.5) for c in (sums, rows))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.integers(2, 5), st.integers(0, 2**20), st.floats(0.1, 1e4))
def test_of_requests_with_one_key_only_the_mean_target_is_written(
    requests: int, keys: int, values: int, sharing: int, seed: int, weight: float
) -> None:
    """The update writes only their mean, unless one target serves them all."""
    keys_EK, residuals_EV, moment_KK = problem(requests + sharing, keys, values, seed)
    keys_EK[-sharing:] = keys_EK[-1]
    mean_EV = residuals_EV.clone()
    mean_EV[-sharing:] = residuals_EV[-sharing:].mean(0)
    deltas = []
    for wanted_EV in (residuals_EV, mean_EV):
        for collected in (
            KeyResidualSums.zeros(keys, values, torch.device("cpu")),
            KeyResidualRows.room(len(keys_EK), keys, values, torch.device("cpu")),
        ):
            collected.add(keys_EK, wanted_EV)
            deltas.append(solve(collected, moment_KK, weight, 0.5))
    for delta_VK in deltas[1:]:
        torch.testing.assert_close(delta_VK, deltas[0], rtol=1e-7, atol=1e-9)


def test_the_form_is_chosen_by_cost() -> None:
    assert cheaper_form(100, 14336, 4096, factored=False) == "requests"
    assert cheaper_form(100, 14336, 4096, factored=True) == "requests"
    assert cheaper_form(14336, 14336, 4096, factored=True) == "keys"
    assert cheaper_form(100_000, 14336, 4096, factored=True) == "keys"
    # In between, a stored factor decides.
    forms = {
        factored: [cheaper_form(e, 4096, 1024, factored=factored) for e in range(1, 4096, 64)]
        for factored in (False, True)
    }
    assert forms[False].count("requests") < forms[True].count("requests")


def test_a_matrix_singular_by_rounding_takes_a_jitter_and_says_so() -> None:
    one_E = torch.ones(3, dtype=torch.float64)
    singular = torch.outer(one_E, one_E)
    found = factor(singular.clone())
    assert 0 < found.jitter <= 1e-11
    torch.testing.assert_close(found.lower @ found.lower.T, singular, rtol=0, atol=1e-10)
    assert factor(torch.eye(3, dtype=torch.float64)).jitter == 0


def test_a_second_moment_is_left_as_it_was() -> None:
    one_E = torch.ones(3, dtype=torch.float64)
    moment_KK = torch.outer(one_E, one_E)
    before = moment_KK.clone()
    assert moment_factor(moment_KK).jitter > 0
    assert torch.equal(moment_KK, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), sizes, sizes, st.integers(0, 2**20), st.data())
def test_sums_and_rows_can_be_split_anywhere(
    requests: int, keys: int, values: int, seed: int, data: st.DataObject
) -> None:
    keys_EK, residuals_EV, moment_KK = problem(requests, keys, values, seed)
    whole = KeyResidualSums.zeros(keys, values, torch.device("cpu"))
    whole.add(keys_EK, residuals_EV)
    parts = KeyResidualSums.zeros(keys, values, torch.device("cpu"))
    cut = data.draw(st.integers(0, requests))
    parts.add(keys_EK[:cut], residuals_EV[:cut])
    parts.add(keys_EK[cut:], residuals_EV[cut:])
    assert parts.count == whole.count == requests
    torch.testing.assert_close(parts.gram_KK, whole.gram_KK, rtol=1e-12, atol=1e-12)
    factor_KK = factor(normal_matrix(whole.gram_KK, moment_KK, 2.0)).lower
    row = data.draw(st.integers(0, values))
    together = torch.cat(
        [solve_rows(factor_KK, whole.cross_VK[:row]), solve_rows(factor_KK, whole.cross_VK[row:])]
    )
    torch.testing.assert_close(
        together, solve_rows(factor_KK, whole.cross_VK), rtol=1e-10, atol=1e-12
    )


def test_float32_sums_become_float64() -> None:
    sums = KeyResidualSums.zeros(2, 1, torch.device("cpu"))
    # 1 + 2⁻³⁰ is 1 in float32.
    sums.add(torch.tensor([[1.0, 2.0**-15]]), torch.tensor([[1.0]]))
    sums.add(torch.tensor([[2.0**-15, 0.0]]), torch.tensor([[0.0]]))
    assert sums.gram_KK[0, 0].item() == 1 + 2.0**-30


def test_shares_of_the_residual_by_layer() -> None:
    shares = {spread: [spread_share(i, 4, spread) for i in range(4)] for spread in get_args(Spread)}
    assert shares["sqrt"] == pytest.approx([1 / 2, 1 / math.sqrt(3), 1 / math.sqrt(2), 1])
    assert shares["linear"] == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert shares["none"] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="not within the 3 edited layers"):
        spread_share(3, 3, "sqrt")


def test_failures_have_names() -> None:
    one = torch.eye(2, dtype=torch.float64)
    with pytest.raises(NotFiniteError, match="KᵀK"):
        normal_matrix(one * torch.nan, one, 1.0)
    with pytest.raises(NotFiniteError, match="C holds NaN"):
        moment_factor(one * torch.inf)
    with pytest.raises(NotPositiveDefiniteError, match=r"leading minor 2 of 2.*1e-11 of its mean"):
        factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
    with pytest.raises(NotFiniteError, match="RᵀK"):
        solve_rows(one, torch.tensor([[torch.inf, 0.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="same model and layer"):
        normal_matrix(one, torch.eye(3), 1.0)


EXPERTS = 5


def routed(requests: int, keys: int, seed: int) -> RoutedKeys:
    """Keys of requests, each routed to one to three experts, never to the last one."""
    draw = torch.Generator().manual_seed(seed)
    pairs = [
        (request, expert)
        for request in range(requests)
        for expert in torch.randperm(EXPERTS - 1, generator=draw)[: 1 + request % 3].tolist()
    ]
    rows_P, experts_P = torch.tensor(pairs).T
    return RoutedKeys(
        rows_P, experts_P, torch.randn(len(pairs), keys, dtype=torch.float64, generator=draw)
    )


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 2**20), st.floats(0.1, 1e3))
def test_experts_minimise_the_bound_of_the_objective(
    requests: int, keys: int, values: int, seed: int, weight: float
) -> None:
    found = routed(requests, keys, seed)
    _, residuals_EV, _ = problem(requests, keys, values, seed)
    moments_XKK = torch.stack([problem(1, keys, 1, seed + x)[2] for x in range(EXPERTS)])
    sizes_P = found.keys_PK.square().sum(1)
    totals_E = torch.zeros(requests, dtype=torch.float64).index_add(0, found.rows_P, sizes_P)
    shares_P1 = (sizes_P / totals_E[found.rows_P])[:, None]

    def bound(deltas_XVK: torch.Tensor) -> torch.Tensor:
        parts_PV = torch.einsum("pvk,pk->pv", deltas_XVK[found.experts_P], found.keys_PK)
        left_PV = shares_P1 * residuals_EV[found.rows_P] - parts_PV
        kept = torch.einsum("xvk,xkl,xvl->", deltas_XVK, moments_XKK, deltas_XVK)
        return (left_PV.square() / shares_P1).sum() + weight * kept

    sums = ExpertSums((keys, values), torch.device("cpu"))
    for request in range(requests):
        own = found.rows_P == request
        alone = RoutedKeys(found.rows_P[own] - request, found.experts_P[own], found.keys_PK[own])
        sums.add(alone, residuals_EV[request : request + 1])
    assert sums.count == requests
    assert EXPERTS - 1 not in sums.by_expert
    solved_XVK = torch.zeros(EXPERTS, values, keys, dtype=torch.float64)
    for expert, delta_VK, _ in solve_experts(sums, moments_XKK, weight, 1.0):
        solved_XVK[expert] = delta_VK
    slope = torch.func.grad(bound)
    assert slope(solved_XVK).norm() <= 1e-7 * slope(torch.zeros_like(solved_XVK)).norm()


def test_one_request_loses_nothing_to_the_shares() -> None:
    """With second moments that prefer no direction, experts together leave what one FFN would."""
    found = routed(3, 6, 0)
    only = found.rows_P == 2
    keys_PK, experts_P = found.keys_PK[only], found.experts_P[only]
    residual_V = torch.randn(1, 4, dtype=torch.float64)
    sums = ExpertSums((6, 4), torch.device("cpu"))
    sums.add(RoutedKeys(torch.zeros(3, dtype=torch.int64), experts_P, keys_PK), residual_V)
    moments_XKK = torch.eye(6, dtype=torch.float64).expand(EXPERTS, -1, -1)
    arrived_V = torch.zeros(4, dtype=torch.float64)
    for expert, delta_VK, _ in solve_experts(sums, moments_XKK, 7.0, 1.0):
        arrived_V += delta_VK @ keys_PK[experts_P == expert][0]
    whole = keys_PK.square().sum()
    torch.testing.assert_close(arrived_V, whole / (whole + 7.0) * residual_V[0])


def test_the_expert_that_cannot_be_solved_for_is_named() -> None:
    sums = ExpertSums((3, 2), torch.device("cpu"))
    keys = RoutedKeys(torch.tensor([0]), torch.tensor([4]), torch.ones(1, 3))
    sums.add(keys, torch.ones(1, 2))
    with pytest.raises(NotPositiveDefiniteError, match=r"KᵀK \+ λC of expert 4 is not positive"):
        list(solve_experts(sums, -torch.eye(3).expand(EXPERTS, -1, -1), 1.0, 1.0))


def test_keys_of_zero_ask_for_nothing_and_nan_is_refused() -> None:
    sums = ExpertSums((3, 2), torch.device("cpu"))
    keys_PK = torch.zeros(3, 3)
    keys_PK[1] = 2.0
    keys = RoutedKeys(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), keys_PK)
    sums.add(keys, torch.ones(2, 2))
    assert (list(sums.by_expert), sums.count) == ([1], 2)
    keys_PK[2, 0] = torch.nan
    sums.add(
        RoutedKeys(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), keys_PK), torch.ones(2, 2)
    )
    with pytest.raises(NotFiniteError, match=r"KᵀK \+ λC holds NaN"):
        list(solve_experts(sums, torch.eye(3).expand(EXPERTS, -1, -1), 1.0, 1.0))
