"""Replacements for parts of a model: pass inputs through, return stored values, skip padding.

A part is replaced during a ``with`` block by a function of its hidden states, its other arguments
and its keywords; the code around it remains the model's own.

Shape letters: B rows, S columns, D model width, N places (row · S + column).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pmet.model.architecture import Layout, is_matrix, part_with, parts_beside
from pmet.model.kernels import put, take
from pmet.model.tracing import first, with_first

# Above this share of tokens among the columns, skipping padding costs more than it saves.
_ENOUGH_TOKENS = 0.9

Stored = Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def replaced(module: nn.Module, run: Stored) -> Iterator[None]:
    """Make ``module`` compute ``run`` of its hidden states, other arguments and keywords."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if args:
            return run(args[0], args[1:], kwargs)
        return run(kwargs["hidden_states"], (), kwargs)

    before = module.__dict__.get("forward")
    module.forward = stand_in
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward")
        else:
            module.forward = before


def passing(output: Any) -> Stored:
    """A function that returns its hidden states, in the form of ``output``."""
    return lambda hidden, _args, _kwargs: with_first(output, hidden)


def called(
    original: Callable[..., Any],
    hidden: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module's code with other hidden states than it was given."""
    if "hidden_states" in kwargs:
        return original(*args, **{**kwargs, "hidden_states": hidden})
    return original(hidden, *args, **kwargs)


def on_places(original: Callable[..., Any], places_N: torch.Tensor) -> Stored:
    """Run a module that processes tokens one by one on some of them; the others become zeros."""

    def run(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows, here_N = hidden.reshape(-1, hidden.shape[-1]), places_N.to(hidden.device)
        output = called(original, take(rows, here_N)[None], args, kwargs)
        full = put(first(output).flatten(0, -2), here_N, len(rows))
        return with_first(output, full.reshape(*hidden.shape[:-1], full.shape[-1]))

    return run


@contextmanager
def layer_on_places(
    model: nn.Module,
    layout: Layout,
    index: int,
    before_N: torch.Tensor | None,
    behind_N: torch.Tensor | None,
) -> Iterator[None]:
    """Within: a layer's matrices process only some tokens, and its attention still sees all.

    Args:
        model: the model.
        layout: the model's layout.
        index: index of the layer.
        before_N: places at which queries, keys and values are computed; None: all.
        behind_N: places at which everything after the attention is computed; None: all.
    """
    layer, projection = layout.layer(model, index), layout.attention_projection(model, index)
    attention = part_with(layer, projection)
    before = [m for m in attention.modules() if is_matrix(m) and m is not projection]
    behind = [projection, *parts_beside(layer, attention)]
    with ExitStack() as stack:
        for modules, places_N in ((before, before_N), (behind, behind_N)):
            if places_N is None:
                continue
            for module in modules:
                stack.enter_context(replaced(module, on_places(module.forward, places_N)))
        yield


def places_of_tokens(mask_BS: torch.Tensor) -> torch.Tensor | None:
    """Places that hold tokens; None if there is too little padding for skipping it to pay."""
    tokens_N = mask_BS.flatten().nonzero()[:, 0]
    return tokens_N if len(tokens_N) < _ENOUGH_TOKENS * mask_BS.numel() else None
