"""Reading keys and current values from whole prompts, for models that allow no shortcut.

Every pass runs every prompt from its first token and its first layer, padded on the right.

Shape letters: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pmet.model import chosen, pad
from pmet.update.lookup_reader import Keys, LookupReader


class WholeReader(LookupReader):
    """The general way: exact for any causal model."""

    _layer: int | None = None

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """See `LookupReader.reading`."""
        self._layer = self._layers[index]
        yield
        self._layer = None

    @torch.no_grad()
    def read(self, batch: int) -> tuple[Keys, torch.Tensor]:
        """See `LookupReader.read`."""
        lookups = self._batches[batch]
        rows = zip(lookups.ids, lookups.contexts, strict=True)
        return self._by_request(lookups, self._run([(*self._shared[c], *ids) for ids, c in rows]))

    @torch.no_grad()
    def run_along(self) -> None:
        """See `LookupReader.run_along`."""
        self._run([(0,)])

    def _run(self, rows: Sequence[tuple[int, ...]]) -> list[Any]:
        """The keys and the values at the rows' last tokens."""
        assert self._layer is not None, "no pass has begun"
        ids_BT, mask_BT = pad(rows, self._device)
        row_starts_B = torch.arange(len(rows), device=self._device) * ids_BT.shape[1]
        ends_B = row_starts_B + mask_BT.sum(1) - 1

        def at_ends(part: torch.Tensor) -> torch.Tensor:
            return chosen(part.reshape(mask_BT.numel(), -1), ends_B)

        with self._noting(self._layer, at_ends) as seen, self._ending():
            self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return seen
