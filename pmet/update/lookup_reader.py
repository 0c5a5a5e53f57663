"""What reads keys and current values: the common part of the fast way and the general one.

Shape letters: B rows of a batch, E requests of a batch, K key width, V value width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pmet.model import Layout, RoutedKeys, first, noting_routed_keys, stopping_after
from pmet.update.keys import Lookups

Keys = torch.Tensor | RoutedKeys
"""``keys_EK`` of requests; or those of the experts that they are routed to."""


class LookupReader(ABC):
    """Reads keys and current values of many requests, pass by pass.

        for index, layer in enumerate(layers):
            with reader.reading(index):
                for batch in range(len(batches)):
                    keys_EK, values_EV = reader.read(batch)
            ...  # change the layer's weight

    Args:
        model: a causal language model in evaluation mode.
        layout: the model's layout.
        layers: the edited layers, ascending; the last one is layer z.
        shared: the `LookupTokenizer`'s shared tokens.
        batches: the `LookupTokenizer`'s batches.
        device: the device where the model takes tokens, and where keys and values are returned.
        whole_passes: for a model whose passes must not be stopped early (ZeRO-3): unneeded modules
            pass their inputs through.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        layers: Sequence[int],
        shared: Sequence[Sequence[int]],
        batches: Sequence[Lookups],
        device: torch.device,
        *,
        whole_passes: bool = False,
    ) -> None:
        self._model, self._layout, self._layers = model, layout, tuple(layers)
        self._shared, self._batches, self._device = shared, batches, device
        self._whole_passes = whole_passes

    @abstractmethod
    def reading(self, index: int) -> AbstractContextManager[None]:
        """Within: the keys of the ``index``-th layer can be read.

        Passes must be in order, with the previous pass's layer edited in between; after the last
        layer, the first one begins anew. The first pass may be any.
        """

    @abstractmethod
    def read(self, batch: int) -> tuple[Keys, torch.Tensor]:
        """``keys_EK`` and ``values_EV`` of a batch, float64, on the device.

        The keys of experts are those of single experts, by request.
        """

    @abstractmethod
    def run_along(self) -> None:
        """Run a single token and discard the result.

        Ranks gather weights together: a rank without a batch must still take part.
        """

    @contextmanager
    def _noting(
        self, layer: int, at_ends: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[list[Any]]:
        """Keys (B, K) of a layer and values (B, V) at the rows' last tokens, after the pass.

        The keys of experts are `RoutedKeys` of B rows.

        Args:
            layer: the layer whose keys are read.
            at_ends: picks the rows' last tokens from a module's input or output.
        """
        seen: list[Any] = []
        key = self._layout.down_projection(self._model, layer)
        value = self._layout.down_projection(self._model, self._layers[-1])
        with ExitStack() as stack:
            if stacked := self._layout.family.stacked:
                stack.enter_context(noting_routed_keys(key, stacked, seen.append, at_ends))
            else:
                noted = key.register_forward_pre_hook(lambda _m, a: seen.append(at_ends(a[0])))
                stack.callback(noted.remove)
            noted = value.register_forward_hook(lambda _m, _a, o: seen.append(at_ends(first(o))))
            stack.callback(noted.remove)
            yield seen

    def _ending(self) -> AbstractContextManager[None]:
        """Within: a pass computes nothing, or as little as possible, above layer z."""
        if self._whole_passes:
            return _without_head(self._model, self._layout)
        return stopping_after(self._layout.layer(self._model, self._layers[-1]))

    def _by_request(self, lookups: Lookups, seen: Sequence[Any]) -> tuple[Keys, torch.Tensor]:
        """``keys_EK`` and ``values_EV`` from what was noted for a batch's rows."""
        keys, values_BV = seen
        values_EV = values_BV.to(self._device)[:: lookups.every].double()
        if isinstance(keys, RoutedKeys):
            routed = RoutedKeys(*(part.to(self._device) for part in keys))
            return lookups.routed_mean_over_contexts(routed, self._layout.experts), values_EV
        return lookups.mean_over_contexts(keys.to(self._device)), values_EV


@contextmanager
def _without_head(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Within: the model returns its last hidden states instead of logits."""
    parent_name, _, name = layout.family.head.rpartition(".")
    parent, head = model.get_submodule(parent_name), layout.head(model)
    setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, name, head)
