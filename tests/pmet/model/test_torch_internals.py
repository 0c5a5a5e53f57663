"""The private names of PyTorch that are used exist in the PyTorch that is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pmet.model import torch_internals
from pmet.model.torch_internals import NAMES
from tests.internals import assert_has, exists

WHERE = "pmet/model/torch_internals.py"


@pytest.mark.parametrize("name", NAMES)
def test_torch_has_the_name(name: str) -> None:
    assert_has(exists(name), name, NAMES, "torch", WHERE)


def test_changes_in_place_are_counted() -> None:
    tensor = torch.zeros(2)
    before = torch_internals.changes(tensor)
    tensor += 1
    assert torch_internals.changes(tensor) > before


def test_the_gradient_of_softmax_is_autograds() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    shares, gradient = scores.softmax(-1), torch.randn(3, 4, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(shares, scores, gradient)
    found = torch_internals.softmax_backward(gradient, shares.detach())
    assert torch.equal(found, wanted)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = "kept"
        return 2 * x


def test_a_custom_function_is_recognised_by_what_it_made() -> None:
    x = torch.ones(2, requires_grad=True)
    context = torch_internals.context_of(Twice.apply(x), Twice)
    assert context is not None, (
        f"torch {torch.__version__} calls the node of a custom function by another name than "
        f"TwiceBackward: used to find what the function kept; see {WHERE}"
    )
    assert context.kept == "kept"
    assert torch_internals.context_of(2 * x, Twice) is None
    assert torch_internals.context_of(x, Twice) is None
