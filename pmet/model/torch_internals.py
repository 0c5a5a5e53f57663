"""Every name that this project uses of PyTorch beyond its documented interface.

``NAMES`` says what each is for and why no public name serves. The tests of this module look for
each of them in the PyTorch that is installed, so that an upgrade that removes one is noticed there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

NAMES = {
    "torch.Tensor._version": (
        "to notice that a tensor was changed in place; no public name counts changes"
    ),
    "torch.utils.weak.WeakTensorKeyDictionary": (
        "to forget a copy with its original; weakref.WeakKeyDictionary compares tensors by value"
    ),
    "torch._softmax_backward_data": (
        "to compute the gradient of softmax in one pass; torch.softmax keeps its own only inside "
        "autograd"
    ),
}


def changes(tensor: torch.Tensor) -> int:
    """How often a tensor has been changed in place."""
    return tensor._version


def weak_by_tensor() -> Any:
    """An empty mapping whose keys are tensors, by identity; an entry goes when its tensor does."""
    return WeakTensorKeyDictionary()


def softmax_backward(to_shares: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The gradient of what went into a softmax over the last dimension.

    Args:
        to_shares: the gradient of what came out.
        shares: what came out, in the same shape and dtype.
    """
    return torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)


def context_of(tensor: torch.Tensor, function: type[torch.autograd.Function]) -> Any | None:
    """The context (``ctx``) of the custom function that made a tensor; None if another made it.

    PyTorch names the node after the function; no public name leads from the one to the other.
    """
    node = tensor.grad_fn
    return node if type(node).__name__ == f"{function.__name__}Backward" else None
