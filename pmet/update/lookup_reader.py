"""What reads keys and current values: the common part of the fast way and the general one.

Shape letters: B rows of a batch, E requests of a batch, K key width, V value width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from pmet.model import Layout, first, stopping_after
from pmet.update.keys import Lookups


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

        Passes must be in order, with the previous pass's layer edited in between. The first may be
        any.
        """

    @abstractmethod
    def read(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys_EK`` and ``values_EV`` of a batch, float64, on the device."""

    @abstractmethod
    def run_along(self) -> None:
        """Run a single token and discard the result.

        Ranks gather weights together: a rank without a batch must still take part.
        """

    @contextmanager
    def _noting(
        self, layer: int, at_ends: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[list[torch.Tensor]]:
        """Keys (B, K) of a layer and values (B, V) at the rows' last tokens, after the pass.

        Args:
            layer: the layer whose keys are read.
            at_ends: picks the rows' last tokens from a module's input or output.
        """
        seen: list[torch.Tensor] = []
        key = self._layout.down_projection(self._model, layer)
        value = self._layout.down_projection(self._model, self._layers[-1])
        handles = [
            key.register_forward_pre_hook(lambda _m, args: seen.append(at_ends(args[0]))),
            value.register_forward_hook(lambda _m, _a, out: seen.append(at_ends(first(out)))),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _ending(self) -> AbstractContextManager[None]:
        """Within: a pass computes nothing, or as little as possible, above layer z."""
        if self._whole_passes:
            return _without_head(self._model, self._layout)
        return stopping_after(self._layout.layer(self._model, self._layers[-1]))

    def _by_request(
        self, lookups: Lookups, seen: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys_EK`` and ``values_EV`` from what was noted for a batch's rows."""
        keys_BK, values_BV = (rows_BX.to(self._device) for rows_BX in seen)
        return lookups.mean_over_contexts(keys_BK), values_BV[:: lookups.every].double()


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
