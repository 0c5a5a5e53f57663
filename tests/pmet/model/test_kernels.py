"""The faster kernels match the stock ones, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pmet.model import kernels
from tests.conftest import Golden


def assert_same_gradients(
    mine: torch.Tensor, stock: torch.Tensor, inputs: tuple[torch.Tensor, ...]
) -> None:
    weights = torch.randn_like(mine)
    for x in inputs:
        gradients = [
            torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (mine, stock)
        ]
        assert torch.allclose(*gradients, rtol=1e-11, atol=1e-12)


def test_tanh_gelu_and_its_gradient_are_the_stock_ones():
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    mine, stock = kernels.tanh_gelu(x), functional.gelu(x, approximate="tanh")
    weights = torch.randn(1001, dtype=torch.float64)
    assert torch.allclose(mine, stock, rtol=1e-13, atol=1e-14)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (mine, stock)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-13)


def test_tanh_gelu_stays_finite_far_out():
    x = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], requires_grad=True)
    y = kernels.tanh_gelu(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0.0, 0.0, 0.0, 50.0, 1e4]
    assert slope.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_short_attention_is_the_stock_attention(heads: int, key_heads: int, scaling: float | None):
    rows, columns, length, width = 3, 2, 7, 5
    query = torch.randn(rows, heads, columns, width, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(rows, key_heads, length, width, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    allowed = torch.rand(rows, 1, columns, length) < 0.7
    allowed[..., 0] = True
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e300)
    mine, _ = kernels.short_attention(torch.nn.Identity(), query, key, value, mask, scaling=scaling)
    stock = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(mine, stock, rtol=1e-12, atol=1e-13)
    assert_same_gradients(mine, stock, (query, key, value))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_gradients_go_to_what_was_written_behind_a_prefix(heads: int, key_heads: int):
    rows, columns, prefix, width = 3, 2, 5, 4
    query = torch.randn(rows, heads, columns, width, dtype=torch.float64, requires_grad=True)
    new_key, new_value = (
        torch.randn(rows, key_heads, columns, width, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    front = [torch.randn(rows, key_heads, prefix, width, dtype=torch.float64) for _ in range(2)]
    # Spare room at the end, with leftovers of the previous step.
    held = [functional.pad(part, (0, 0, 0, columns), value=7.0) for part in front]
    mask = torch.zeros(rows, 1, columns, prefix + columns, dtype=torch.float64)
    mask[:, :, 0, -1] = -1e300
    mine, _ = kernels.short_attention(
        torch.nn.Identity(),
        query,
        kernels.written_behind(held[0], prefix, new_key),
        kernels.written_behind(held[1], prefix, new_value),
        mask,
    )
    stock = functional.scaled_dot_product_attention(
        query,
        torch.cat([front[0], new_key], dim=2),
        torch.cat([front[1], new_value], dim=2),
        attn_mask=mask,
        enable_gqa=True,
    ).transpose(1, 2)
    assert torch.allclose(mine, stock, rtol=1e-12, atol=1e-13)
    assert_same_gradients(mine, stock, (query, new_key, new_value))


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.permutations(range(n)))))
def test_taking_and_putting_are_each_others_transpose(drawn: tuple[int, list[int]]):
    count, order = drawn
    index = torch.tensor(order[: (count + 1) // 2])
    rows = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    some = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
    taken, placed = kernels.take(rows, index), kernels.put(some, index, count)
    assert torch.equal(taken, rows[index])
    assert torch.equal(placed[index], some)
    assert placed.count_nonzero() == some.count_nonzero()
    # ⟨take(x), y⟩ = ⟨x, put(y)⟩, also by their gradients.
    assert torch.allclose((taken * some).sum(), (rows * placed).sum())
    assert torch.equal(torch.autograd.grad((taken * some.detach()).sum(), rows)[0], placed)
    assert torch.equal(torch.autograd.grad((placed * rows.detach()).sum(), some)[0], taken)


def test_a_model_computes_the_same_while_tuned_and_is_itself_afterwards(golden: Golden):
    model = golden.model
    ids = torch.randint(0, 700, (2, 9))
    state = copy.deepcopy(dict(model.config.to_dict()))
    attention = model.config._attn_implementation
    names = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with kernels.tuned(model, longest=9):
            within = model(input_ids=ids).logits
            assert names < {n for n, m in model.named_modules() if "forward" in m.__dict__} or (
                golden.family == "llama"
            )
        after = model(input_ids=ids).logits
    assert torch.allclose(within, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, before)
    assert model.config._attn_implementation == attention
    assert dict(model.config.to_dict()) == state
    assert {n for n, m in model.named_modules() if "forward" in m.__dict__} == names
