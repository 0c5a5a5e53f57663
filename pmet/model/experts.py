"""Experts whose weights are stacked in one parameter, and the keys of those a token is routed to.

The output of a layer's experts at a token is Σ_i g_i (W_i k_i + b_i), over the experts i that the
token is routed to; g_i is the gate's weight, k_i the input of expert i's down-projection W_i. It is
linear in W_i, so g_i k_i can be read without knowing how a family computes it: call the experts
with one of the token's choices, the identity in place of W_i, and zero in place of b_i. Whether
that holds for a family is tried on the model's miniature.

Shape letters: N tokens, C choices per token, P = N·C pairs of token and expert, D model width,
K key width, X experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from pmet.model.tracing import first


@dataclass(frozen=True)
class Stacked:
    """A parameter that stacks the down-projections of a module's experts.

    Attributes:
        weight: its name within the module.
        transposed: it is (X, K, D), not (X, D, K).
        per_token: C, the experts that a token is routed to.
    """

    weight: str
    transposed: bool
    per_token: int


class RoutedKeys(NamedTuple):
    """Keys of single experts, times their gates: a row per token and expert that it is routed to.

    Attributes:
        rows_P: the token, or the request, that a key belongs to; int64.
        experts_P: the expert; int64.
        keys_PK: g_i k_i.
    """

    rows_P: torch.Tensor
    experts_P: torch.Tensor
    keys_PK: torch.Tensor


class NotRoutedError(Exception):
    """A module is not called with hidden states, the chosen experts and their gates."""


_Slot = int | str


@dataclass(frozen=True)
class _Call:
    """A call of an experts module: which of its arguments, by place or name, are what."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: _Slot
    experts: _Slot
    gates: _Slot

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Recognise the arguments by their types and shapes."""
        given: dict[_Slot, Any] = dict(enumerate(args))
        given.update(kwargs)
        tensors = {slot: value for slot, value in given.items() if isinstance(value, torch.Tensor)}
        numbers = [s for s, t in tensors.items() if t.is_floating_point()]
        indices = [s for s, t in tensors.items() if not t.is_floating_point() and t.dim() == 2]
        if not numbers or not indices:
            raise NotRoutedError
        shape = tensors[indices[0]].shape
        gates = [slot for slot in numbers[1:] if tensors[slot].shape == shape]
        if not gates or tensors[numbers[0]].flatten(0, -2).shape[0] != shape[0]:
            raise NotRoutedError
        return cls(args, kwargs, numbers[0], indices[0], gates[0])

    def __getitem__(self, slot: _Slot) -> torch.Tensor:
        value: torch.Tensor = self.kwargs[slot] if isinstance(slot, str) else self.args[slot]
        return value

    def changed(self, values: dict[_Slot, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The call's arguments, some of them replaced."""
        args = [values.get(place, value) for place, value in enumerate(self.args)]
        return args, {name: values.get(name, value) for name, value in self.kwargs.items()}


@torch.no_grad()
def routed_keys(
    module: nn.Module,
    stacked: Stacked,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pick: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> RoutedKeys:
    """The keys of an experts module's call, ordered by token.

    Args:
        module: the module.
        stacked: its stacked weight.
        args: the call's arguments.
        kwargs: its keyword arguments.
        pick: picks some tokens' rows, from tensors with a row per token; None: all.

    Raises:
        NotRoutedError: the call is not one of experts.
    """
    call = _Call.of(args, kwargs)
    pick = pick or (lambda rows: rows)
    hidden_ND = pick(call[call.hidden].flatten(0, -2))
    index_P, gates_P = (pick(call[slot]).flatten() for slot in (call.experts, call.gates))
    weight = getattr(module, stacked.weight)
    rows_P = torch.arange(len(hidden_ND), device=index_P.device)
    rows_P = rows_P.repeat_interleave(len(index_P) // len(hidden_ND))
    # A number past the last expert's marks a choice that no expert here takes.
    here = index_P < len(weight)
    rows_P, index_P, gates_P = rows_P[here], index_P[here], gates_P[here]
    single: dict[_Slot, torch.Tensor] = {
        call.hidden: hidden_ND.index_select(0, rows_P),
        call.experts: index_P[:, None],
        call.gates: gates_P[:, None],
    }
    single_args, single_kwargs = call.changed(single)
    # The code behind any faster form of it, which may want contiguous weights.
    plain = inspect.unwrap(type(module).forward)
    key_width = weight.shape[1 if stacked.transposed else 2]
    value_width = weight.shape[2 if stacked.transposed else 1]
    parts = []
    with _shadowed(module, f"{stacked.weight}_bias", torch.zeros_like):
        for start in range(0, key_width, value_width):
            with _shadowed(module, stacked.weight, _rows_of_identity(stacked, start)):
                output = first(plain(module, *single_args, **single_kwargs))
            parts.append(output[:, : key_width - start])
    return RoutedKeys(rows_P, index_P.long(), torch.cat(parts, dim=1))


def _rows_of_identity(stacked: Stacked, start: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of the stacked weight: as many rows of I (K×K) for each expert, from a row on."""

    def rows(weight: torch.Tensor) -> torch.Tensor:
        shape_DK = weight.mT.shape[1:] if stacked.transposed else weight.shape[1:]
        identity_DK = weight.new_zeros(shape_DK)
        identity_DK.diagonal(start).fill_(1)
        one = identity_DK.T if stacked.transposed else identity_DK
        return one.expand(weight.shape)

    return rows


@contextmanager
def _shadowed(
    module: nn.Module, name: str, made: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Within: a module's code sees ``made(parameter)`` in place of a parameter, if it has it.

    The parameter itself stays where it is, and so does what partitions it.
    """
    parameter = getattr(module, name, None)
    if parameter is None:
        yield
        return
    module.__dict__[name] = made(parameter)
    try:
        yield
    finally:
        del module.__dict__[name]


@contextmanager
def noting_routed_keys(
    module: nn.Module,
    stacked: Stacked,
    note: Callable[[RoutedKeys], object],
    pick: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within: pass the keys of each call of an experts module to ``note``, before it runs."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(routed_keys(module, stacked, args, kwargs, pick))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def stacked_in(module: nn.Module, run: Callable[[], object], same: float) -> Stacked | None:
    """The stacked down-projection of a module, or None if keys cannot be read as described above.

    Args:
        module: a module of a small model.
        run: runs the model, and the module once.
        same: the relative distance from the module's own output that counts as none.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []

    def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, first(output)))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    ((args, kwargs, output_ND),) = calls
    output_ND = output_ND.flatten(0, -2)
    for name, parameter in module.named_parameters(recurse=False):
        for transposed in (False, True):
            if parameter.dim() != 3 or parameter.shape[1 + transposed] != output_ND.shape[1]:
                continue
            try:
                call = _Call.of(args, kwargs)
                stacked = Stacked(name, transposed, call[call.experts].shape[1])
                if _distance(module, stacked, args, kwargs, output_ND) <= same:
                    return stacked
            except Exception:  # noqa: BLE001, S110 - whatever a family's code raises
                pass
    return None


def _distance(
    module: nn.Module,
    stacked: Stacked,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output_ND: torch.Tensor,
) -> float:
    """How far a module's output is from that of its keys, its weight and its biases."""
    found = routed_keys(module, stacked, args, kwargs)
    with _shadowed(module, stacked.weight, torch.zeros_like):
        biases_ND = first(type(module).forward(module, *args, **kwargs)).flatten(0, -2)
    weight = getattr(module, stacked.weight)
    weight_XDK = weight.mT if stacked.transposed else weight
    parts_PD = torch.einsum("pdk,pk->pd", weight_XDK[found.experts_P], found.keys_PK)
    again_ND = biases_ND.index_add(0, found.rows_P, parts_PD)
    return float((again_ND - output_ND).norm() / output_ND.norm().clamp_min(1e-30))
