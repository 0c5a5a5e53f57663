"""λ as a number, and as a share of the scale of the keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmet import PMETHyperParams
from pmet.update.solver import solve
from pmet.update.sums import KeyResidualRows, KeyResidualSums
from pmet.update.weight import KeyPower, update_weight

SHARE = PMETHyperParams(layers=(0,), mom2_update_share=0.25)
CPU = torch.device("cpu")


def collected(keys_EK: torch.Tensor) -> list[KeyResidualSums | KeyResidualRows]:
    width = keys_EK.shape[1]
    both = [KeyResidualSums.zeros(width, 2, CPU), KeyResidualRows.room(len(keys_EK), width, 2, CPU)]
    for one in both:
        one.add(keys_EK, torch.ones(len(keys_EK), 2))
    return both


def test_a_number_is_taken_as_it_is() -> None:
    hparams = PMETHyperParams(layers=(0,), mom2_update_weight=7.0)
    assert update_weight(hparams, KeyPower(123.0, 4), torch.eye(3)) == 7.0


@given(
    st.integers(1, 5),
    st.integers(2, 4),
    st.floats(0.01, 100, allow_subnormal=False),
    st.integers(0, 2**32 - 1),
)
def test_a_share_depends_neither_on_the_number_of_requests_nor_on_the_size_of_activations(
    count: int, copies: int, size: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    keys_EK = torch.randn(count, 6, generator=draw, dtype=torch.float64)
    text_NK = torch.randn(9, 6, generator=draw, dtype=torch.float64)
    moment_KK = text_NK.T @ text_NK / len(text_NK)
    (of_sums, of_rows) = (update_weight(SHARE, c.power, moment_KK) for c in collected(keys_EK))
    assert of_sums == pytest.approx(of_rows)
    more, _ = collected(keys_EK.repeat(copies, 1))
    assert update_weight(SHARE, more.power, moment_KK) == pytest.approx(of_sums)
    larger, _ = collected(size * keys_EK)
    assert update_weight(SHARE, larger.power, size**2 * moment_KK) == pytest.approx(of_sums)


def test_a_single_request_takes_up_what_the_share_leaves() -> None:
    keys_EK = torch.randn(1, 6, dtype=torch.float64)
    moment_KK = 3.0 * torch.eye(6, dtype=torch.float64)
    for one in collected(keys_EK):
        weight = update_weight(SHARE, one.power, moment_KK)
        taken_V = solve(one, moment_KK, weight, 1.0) @ keys_EK[0]
        assert taken_V.tolist() == pytest.approx([1 / 1.25] * 2)


def test_experts_count_as_one_matrix() -> None:
    moment_XKK = torch.stack([torch.eye(3), 3 * torch.eye(3)])
    # Eigenvalues of 2 on average.
    assert update_weight(SHARE, KeyPower(16.0, 2), moment_XKK) == pytest.approx(0.25 * 8 / 2)
