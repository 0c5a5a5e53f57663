"""Capturing and changing a model's intermediate values during a forward pass.

    with captured_input(module) as seen:      # seen.tensor: the module's first input
        model(...)

Every context manager here removes its hooks on exit, even if the body raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to stop a forward pass once it has captured what was needed."""


@dataclass
class Seen:
    """The tensor that a hook captured last."""

    _tensor: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The captured tensor.

        Raises:
            RuntimeError: the module has not run.
        """
        if self._tensor is None:
            raise RuntimeError("the traced module did not run in this forward pass")
        return self._tensor

    def take(self, tensor: torch.Tensor) -> None:
        """Keep ``tensor`` in its current state: some models later change it in place (Falcon)."""
        self._tensor = tensor.detach().clone()


def first(value: Any) -> torch.Tensor:
    """The hidden states of a module's output, which older modules wrap in a tuple."""
    return value[0] if isinstance(value, tuple) else value


def with_first(value: Any, tensor: torch.Tensor) -> Any:
    """``value`` with its hidden states replaced by ``tensor``."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def form_of(value: Any) -> Any:
    """The part of a module's output that ``with_first`` needs to build another: no tensors."""
    return (None,) * len(value) if isinstance(value, tuple) else None


@contextmanager
def captured_input(module: nn.Module) -> Iterator[Seen]:
    """Keep the first input of ``module``."""
    seen = Seen()

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.take(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def captured_output(module: nn.Module) -> Iterator[Seen]:
    """Keep the output of ``module``."""
    seen = Seen()
    handle = module.register_forward_hook(lambda _m, _a, output: seen.take(first(output)))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def changed_output(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Pass the output of ``module`` through ``change``."""
    handle = module.register_forward_hook(
        lambda _m, _a, output: with_first(output, change(first(output)))
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed_input(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Pass the first input of ``module`` through ``change``."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stopping_after(module: nn.Module) -> Iterator[None]:
    """End the forward pass in the body once ``module`` has run; nothing above it is computed.

    Not for models partitioned by ZeRO-3, whose bookkeeping expects every pass to finish.
    """

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise StopForward

    handle = module.register_forward_hook(hook)
    try:
        yield
    except StopForward:
        pass
    finally:
        handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the weights; both are restored afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def takes_positions(model: nn.Module) -> bool:
    """Whether the model accepts positions, rather than counting them itself (ALiBi)."""
    return "position_ids" in _parameters(type(model).forward)


def cache_name(model: nn.Module) -> str:
    """The name of the model's argument and output for keys and values of earlier tokens."""
    return "cache" if "cache" in _parameters(type(model).forward) else "past_key_values"


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
