"""Low-rank factors: the distance is Eckart and Young's, whatever the matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmet.low_rank import LOST, low_rank

# Two float64 sums of squares differ by rounding; squaring Δ adds 1e-8 of its largest value.
CLOSE = 1e-7


def spread(shape: tuple[int, int], decades: float, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A matrix whose singular values fall by so many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    size = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64))[0]
        for n in shape
    )
    values = torch.logspace(0, -decades, size, dtype=torch.float64)
    return scale * (left * values) @ right.T


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    decades=st.floats(0, 12),
    seed=st.integers(0, 99),
    scale=st.sampled_from((1e-30, 1.0, 1e20)),
    rank=st.integers(1, 30),
    energy=st.floats(0.01, 1),
)
def test_the_distance_is_that_of_the_values_left_out(
    shape: tuple[int, int], decades: float, seed: int, scale: float, rank: int, energy: float
) -> None:
    delta = spread(shape, decades, seed, scale)
    squares = torch.linalg.svdvals(delta).square()
    for found, bound in (
        (low_rank(delta, rank=rank), min(rank, *shape)),
        (low_rank(delta, energy=energy), None),
    ):
        apart, _ = found.distance(delta)
        left_out = squares[found.rank :].sum() / squares.sum()
        assert apart == pytest.approx(left_out.sqrt().item(), abs=CLOSE)
        assert found.energy == pytest.approx(1 - left_out.item(), abs=CLOSE)
        assert found.left_VR.shape == (shape[0], found.rank)
        assert found.right_RK.shape == (found.rank, shape[1])
        if bound is not None:
            assert found.rank == min(bound, found.full_rank)
        else:
            # No smaller rank keeps as much.
            assert found.energy >= energy - CLOSE
            assert 1 - squares[found.rank - 1 :].sum() / squares.sum() < energy + CLOSE


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_a_product_of_twelve_facts_has_rank_twelve(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in shape)
    found = low_rank(left @ right.T)
    assert (found.rank, found.full_rank) == (12, 12)
    assert max(found.distance(left @ right.T)) < 1e-12
    # Rounded as they are stored.
    assert max(found.to(torch.float32).distance(left @ right.T)) < 4 * LOST


def test_factors_share_the_size_of_delta() -> None:
    delta = 1e6 * spread((30, 50), 3, 0)
    found = low_rank(delta, rank=8)
    assert found.left_VR.norm() == pytest.approx(found.right_RK.norm().item())
    assert found.left_VR.norm() == pytest.approx(
        math.sqrt(torch.linalg.svdvals(delta)[:8].sum().item())
    )


def test_no_change_has_no_rank() -> None:
    found = low_rank(torch.zeros(3, 5, dtype=torch.float64), rank=2)
    assert (found.rank, found.full_rank, found.energy) == (0, 0, 1.0)
    assert found.product().equal(torch.zeros(3, 5, dtype=torch.float64))
    assert found.distance(torch.zeros(3, 5, dtype=torch.float64)) == (0.0, 0.0)
