"""One model on several devices, for a model that is too large for a single one.

The layers are split among the devices in order; everything else (embeddings, last norm, head) is
on the first one, the *home*, where tokens enter and logits leave. The inputs of a layer are moved
to its device. The devices compute one after the other: this gains memory, not speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from pmet.errors import ArchitectureError
from pmet.model.architecture import Layout
from pmet.model.torch_internals import changes, weak_by_tensor


def home(model: nn.Module) -> torch.device:
    """The device where a model takes tokens and returns logits: that of its embeddings."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = embeddings.weight.device
    return device


def share_out(
    model: nn.Module, devices: Sequence[torch.device], room: Sequence[float] | None = None
) -> nn.Module:
    """Split a model among several devices, permanently.

    Nothing else changes: its results and the names of its parameters stay the same.

    Args:
        model: a causal language model.
        devices: the first one is the model's home.
        room: the room on each device, in any unit; None: the same for all.

    Returns:
        The model.

    Raises:
        ArchitectureError: it has no list of layers.
    """
    layers = _layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    rest = sum(_bytes(p) for p in model.parameters() if id(p) not in inside)
    sizes = [sum(map(_bytes, layer.parameters())) for layer in layers]
    owners = shares(sizes, rest, room or [1.0] * len(devices))
    movers = [_Mover(device) for device in devices]
    for layer, owner in zip(layers, owners, strict=True):
        layer.to(devices[owner])
        movers[owner].serve(layer)
    for module in _outside(model, layers):
        module.to(devices[0])
        movers[0].serve(module)
    return model


def shares(sizes: Sequence[int], rest: int, room: Sequence[float]) -> list[int]:
    """Assign a device to each layer so that all devices are filled evenly.

    Args:
        sizes: sizes of the layers, in order.
        rest: size of everything else on the first device.
        room: the room on each device, in any unit.
    """
    # If the rest exceeds the first device's share, that device gets no layer.
    first = max(0.0, (rest + sum(sizes)) * room[0] / sum(room) - rest)
    others = [(sum(sizes) - first) * part / sum(room[1:]) for part in room[1:]]
    limits = list(accumulate([first, *others]))
    owners, owner, before = [], 0, 0
    for size in sizes:
        # The midpoint of a layer decides its device.
        while owner + 1 < len(limits) and before + size / 2 > limits[owner]:
            owner += 1
        owners.append(owner)
        before += size
    return owners


def layers_on(model: nn.Module, layout: Layout, above: int) -> dict[torch.device, float]:
    """The share of the layers above one that each device holds; all at home if there are none."""
    numbers = range(above + 1, layout.depth)
    parameters = [next(layout.layer(model, i).parameters()) for i in numbers]
    devices = [parameter.device for parameter in parameters] or [home(model)]
    return {device: devices.count(device) / len(devices) for device in dict.fromkeys(devices)}


def chosen(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor, with indices on any device."""
    return tensor.index_select(0, rows.to(tensor.device))


class _Mover:
    """Moves the inputs of modules to a device.

    All layers get the same mask and positions: a moved copy is reused for as long as its original
    exists, and neither is changed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._brought = weak_by_tensor()

    def serve(self, module: nn.Module) -> None:
        """Start moving a module's inputs, before its other hooks, so that these see the result."""
        module.register_forward_pre_hook(
            lambda _module, args, kwargs: (self._bring(args), self._bring(kwargs)),
            prepend=True,
            with_kwargs=True,
        )

    def _bring(self, value: Any) -> Any:
        # Not deeper: a cache holds each layer's own tensors, which are already on its device.
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._bring, value))
        if type(value) is dict:
            return {name: self._bring(item) for name, item in value.items()}
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self._device:
            return tensor
        if tensor.requires_grad:
            return tensor.to(self._device)
        version = changes(tensor)
        found, *versions = self._brought.get(tensor, (None,))
        if found is None or versions != [version, changes(found)]:
            found = tensor.to(self._device)
            self._brought[tensor] = (found, version, changes(found))
        return found


def _layers(model: nn.Module) -> nn.ModuleList:
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ArchitectureError(
        f"{type(model).__name__} has no list of {depth} layers, so it cannot be split among "
        "several devices; give each worker one GPU"
    )


def _outside(module: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The largest modules that contain none of the layers."""
    for child in module.children():
        if child is layers:
            continue
        if any(part is layers for part in child.modules()):
            yield from _outside(child, layers)
        else:
            yield child


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
