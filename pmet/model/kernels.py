"""Activations and attention for many short rows, where the stock kernels are too slow.

Matrix products dominate the optimisation of targets only if everything else is fast. On a CPU two
things were not: the tanh form of GELU, and attention between a few queries and a few dozen keys,
whose stock backward pass takes four times its forward pass. Both are replaced while targets are
computed, by the same formulas in fewer passes; and memory freed by a step is kept for the next one.

Shape letters: B rows, H heads, S queries, T keys, d head width.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from pmet.model.miniature import SAME, farthest_apart, holds
from pmet.model.tokenization import pad
from pmet.model.torch_internals import context_of, softmax_backward
from pmet.model.tracing import changed_output
from pmet.model.transformers_internals import (
    position_tables,
    replaceable_attention,
    tanh_gelus,
)

_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = _SLOPE * 0.044715

_SHORT_ROWS = "pmet_short_rows"
_SHORT = 128  # tokens of a row


class _TanhGelu(torch.autograd.Function):
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (Hendrycks & Gimpel 2016, section 2).

    Written as the equivalent x·σ(2u): σ costs a quarter of tanh. The derivative is computed in the
    forward pass, so that the backward pass is one product.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        linear = x.new_tensor(_SLOPE)
        gate = torch.addcmul(linear, x, x, value=_CUBIC).mul_(x).sigmoid_()
        value = x * gate
        if ctx.needs_input_grad[0]:
            # σ + y·(1 − σ)·(a + 3bx²)
            slope = torch.addcmul(linear, x, x, value=3 * _CUBIC).mul_(value)
            ctx.save_for_backward(slope.addcmul_(slope, gate, value=-1).add_(gate))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form, in the fastest kernel for the tensor's device."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        result: torch.Tensor = _TanhGelu.apply(x)
        return result
    return functional.gelu(x, approximate="tanh")


class _Behind(torch.autograd.Function):
    """Write keys or values after the stored ones, in place, without copying the stored ones."""

    @staticmethod
    def forward(ctx: Any, held: torch.Tensor, length: int, new: torch.Tensor) -> torch.Tensor:
        ctx.length, ctx.new = length, new
        held[:, :, length:] = new
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, None, gradient[:, :, ctx.length :]


def written_behind(held: torch.Tensor, length: int, new: torch.Tensor) -> torch.Tensor:
    """``held`` with its columns from ``length`` on overwritten by ``new``.

    Args:
        held: (B, H, T, d), constants.
        length: how many of its columns are kept.
        new: (B, H, T − length, d); the gradient flows here.
    """
    result: torch.Tensor = _Behind.apply(held, length, new)
    return result


def _new_part(keys: torch.Tensor) -> torch.Tensor:
    """The columns of keys or values that are no constants: those written behind, or all."""
    context = context_of(keys, _Behind)
    return keys if context is None else context.new


class _ShortAttention(torch.autograd.Function):
    """softmax(scale·QKᵀ + mask) V for (B·H, S, d) queries and (B·H, T, d) keys.

    Keys and values are constant except for their last columns, which are passed again as
    (B, H, ·, d) to receive their gradients; the gradients of the prefix are not needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        new_key: torch.Tensor,
        new_value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        shares = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scale, ctx.shapes = scale, (new_key.shape, new_value.shape)
        return torch.bmm(shares, value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, shares = ctx.saved_tensors
        new_key, new_value = ctx.shapes
        to_value = torch.bmm(shares[:, :, -new_value[2] :].transpose(1, 2), gradient)
        to_shares = torch.bmm(gradient, value.transpose(1, 2))
        to_scores = softmax_backward(to_shares, shares)
        to_scores = to_scores.mul_(ctx.scale)
        to_query = torch.bmm(to_scores, key)
        to_key = torch.bmm(to_scores[:, :, -new_key[2] :].transpose(1, 2), query)
        return to_query, None, None, to_key.view(new_key), to_value.view(new_value), None, None


def short_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature that transformers expects, for few queries per row.

    Args:
        module: the calling attention module.
        query: (B, H, S, d).
        key: (B, key heads, T, d); the number of query heads is a multiple of theirs.
        value: as ``key``.
        attention_mask: added to the scores, (B or 1, 1 or H, S, T).
        scaling: factor on the scores; None: 1/√d.
        others: further arguments for the stock implementation.

    Returns:
        (B, S, H, d), and no weights.
    """
    if attention_mask is None or others.get("position_bias") is not None:
        stock = AttentionInterface()["sdpa"]
        result: tuple[torch.Tensor, None] = stock(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return result
    rows, heads, columns, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    # Query heads that share keys become further queries of one head.
    shape = (rows * groups, heads // groups * columns)
    out = _ShortAttention.apply(
        query.reshape(*shape, width),
        key.detach().reshape(rows * groups, length, width),
        value.detach().reshape(rows * groups, length, value.shape[-1]),
        _new_part(key),
        _new_part(value),
        attention_mask.expand(rows, heads, columns, length).reshape(*shape, length),
        width**-0.5 if scaling is None else scaling,
    )
    return out.reshape(rows, heads, columns, -1).transpose(1, 2), None


AttentionInterface.register(_SHORT_ROWS, short_attention)
AttentionMaskInterface.register(_SHORT_ROWS, AttentionMaskInterface()["eager"])


class _Take(torch.autograd.Function):
    """Rows of a matrix, each at most once; the backward pass writes instead of adding."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _placed(gradient, ctx.saved_tensors[0], ctx.count), None


class _Put(torch.autograd.Function):
    """The transpose of taking: put rows into a matrix of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        return _placed(rows, index, count)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def _placed(rows: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, index, rows)


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]`` for an index without repetitions."""
    result: torch.Tensor = _Take.apply(rows, index)
    return result


def put(rows: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows, zero except for ``rows`` at ``index``, which has no repetitions."""
    result: torch.Tensor = _Put.apply(rows, index, count)
    return result


@contextmanager
def tuned(model: nn.Module, longest: int) -> Iterator[None]:
    """Within: the model computes with the kernels above, where they apply.

    Args:
        model: the model, which is restored afterwards.
        longest: the maximum number of tokens in a row.
    """
    with fused(model, longest), _short_rows(model), keeping_freed_memory(model):
        yield


@contextmanager
def fused(model: nn.Module, longest: int) -> Iterator[None]:
    """As `tuned`, without the parts for short rows and without keeping memory."""
    with _fused_activations(model), _short_position_tables(model, longest):
        yield


@contextmanager
def tuned_if_short(model: nn.Module, longest: int) -> Iterator[None]:
    """As `tuned`, if rows are short enough for the kernels for short rows to be faster."""
    with tuned(model, longest) if longest <= _SHORT else nullcontext():
        yield


@contextmanager
def _short_position_tables(model: nn.Module, longest: int) -> Iterator[None]:
    """Cut the tables that GPT-J copies for every row, in every layer, at every step."""
    found = list(position_tables(model))
    for module, name, table in found:
        setattr(module, name, table[:longest])
    try:
        yield
    finally:
        for module, name, table in found:
            setattr(module, name, table)


@contextmanager
def _fused_activations(model: nn.Module) -> Iterator[None]:
    found = tanh_gelus(model)
    for module in found:
        module.forward = tanh_gelu
    try:
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


@contextmanager
def _short_rows(model: nn.Module) -> Iterator[None]:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not on_cpu or replaceable_attention(model) != "sdpa" or not holds(model, _computes_the_same):
        yield
        return
    with _other_attention(model):
        yield


@contextmanager
def _other_attention(model: nn.Module) -> Iterator[None]:
    chooser: Any = model
    chooser.set_attn_implementation(_SHORT_ROWS)
    try:
        yield
    finally:
        chooser.set_attn_implementation("sdpa")


def _computes_the_same(model: nn.Module) -> bool:
    """Whether attention for short rows is a model's own, in logits and gradients.

    A family may pass terms of its own to its attention, which the one for short rows leaves out.
    """
    own = _logits_and_gradient(model)
    with _other_attention(model):
        return farthest_apart(_logits_and_gradient(model), own) <= SAME


def _logits_and_gradient(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two padded rows: logits at their tokens, and the gradient at the first of them."""
    ids_BT, mask_BT = pad([[3, 5, 8, 2, 7], [6, 4, 1]], torch.device("cpu"))
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    change_D = torch.zeros(embeddings.weight.shape[1], requires_grad=True)

    def changed(embedded_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([embedded_BTD[:, :1] + change_D, embedded_BTD[:, 1:]], dim=1)

    with torch.enable_grad(), changed_output(embeddings, changed):
        output = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        logits_NV = output.logits[mask_BT.bool()]
        weights_NV = torch.linspace(-1, 1, logits_NV.numel()).view_as(logits_NV)
        (gradient_D,) = torch.autograd.grad((logits_NV * weights_NV).sum(), change_D)
    return logits_NV.detach(), gradient_D


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_MMAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
_MIB = 1 << 20


@contextmanager
def keeping_freed_memory(model: nn.Module, largest: int = 32 * _MIB) -> Iterator[None]:
    """Keep glibc from returning freed blocks to the system, only to fault them in again.

    Half of a step's time was spent on that. Blocks of more than ``largest`` bytes are still
    returned. Afterwards the thresholds are those in the environment, or those that glibc's own
    adaptation reaches in a program that has freed large blocks.
    """
    libc = _glibc() if next(model.parameters()).device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, largest)
    libc.mallopt(_TRIM_THRESHOLD, 2047 * _MIB)
    try:
        yield
    finally:
        given = os.environ.get(_MMAP_VARIABLE, "")
        libc.mallopt(_MMAP_THRESHOLD, int(given) if given.isdecimal() else 32 * _MIB)
        libc.mallopt(_TRIM_THRESHOLD, 64 * _MIB)
        libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
