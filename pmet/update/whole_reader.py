"""Reading keys and current values from whole prompts, for models that allow no shortcut.

The same interface as `pmet.update.key_reader.KeyReader`: every pass runs every prompt from its
first token and its first layer, padded on the right.

Shape letters: B rows of a batch, T tokens of its longest row, E requests, K key width, V value
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pmet.model import Layout, chosen, first, pad, stopping_after
from pmet.update.key_reader import without_head
from pmet.update.keys import Lookups


class WholeReader:
    """Reads keys and current values of many requests.

    Args:
        model: a causal language model in evaluation mode.
        layout: the model's layout.
        layers: the edited layers, ascending; the last one is layer z.
        shared: the `LookupTokenizer`'s shared tokens.
        batches: the `LookupTokenizer`'s batches.
        device: the device where the model takes tokens, and where keys and values are returned.
        whole_passes: for a model whose passes must not be stopped early (ZeRO-3).
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
        self._layer: int | None = None

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Within: the keys of the ``index``-th layer can be read."""
        self._layer = self._layers[index]
        yield
        self._layer = None

    @torch.no_grad()
    def read(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys_EK`` and ``values_EV`` of a batch, float64, on the device."""
        lookups = self._batches[batch]
        rows = zip(lookups.ids, lookups.contexts, strict=True)
        keys_BK, values_BV = self._run([(*self._shared[c], *ids) for ids, c in rows])
        keys_EK = lookups.mean_over_contexts(keys_BK.to(self._device))
        return keys_EK, values_BV[:: lookups.every].double().to(self._device)

    @torch.no_grad()
    def run_along(self) -> None:
        """Run a single token and discard the result, so that other ranks can gather weights."""
        self._run([(0,)])

    def _run(self, rows: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The key (B, K) and the value (B, V) at each row's last token."""
        assert self._layer is not None, "no pass has begun"
        model, layout, z = self._model, self._layout, self._layers[-1]
        ids_BT, mask_BT = pad(rows, self._device)
        ends_B = torch.arange(len(rows), device=self._device) * ids_BT.shape[1]
        ends_B = ends_B + mask_BT.sum(1) - 1
        seen: list[torch.Tensor] = []

        def note(part: torch.Tensor) -> None:
            seen.append(chosen(part.reshape(mask_BT.numel(), -1), ends_B))

        handles = [
            layout.down_projection(model, self._layer).register_forward_pre_hook(
                lambda _module, args: note(args[0])
            ),
            layout.down_projection(model, z).register_forward_hook(
                lambda _module, _args, output: note(first(output))
            ),
        ]
        ending = (
            without_head(model, layout)
            if self._whole_passes
            else stopping_after(layout.layer(model, z))
        )
        try:
            with ending:
                model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        keys_BK, values_BV = seen
        return keys_BK, values_BV
