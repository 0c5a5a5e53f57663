"""Reading keys and current values, with one pass over all requests for each edited layer.

The current value is the down-projection's output at layer z in the bare context, and both are read
with all earlier deltas applied. Unnecessary work is skipped:

- nothing above layer z, no token after the subject's last one, and at layer z only the attention's
  keys and values of the tokens before it are computed;
- the tokens that a template puts before every prompt run once per pass, not once per request;
- a delta changes nothing below its layer: a pass starts at the layer that was edited last, from
  the hidden states that the previous pass stored there.

Shape letters: B rows of a batch, T tokens of its longest row, N tokens in all, C contexts, P tokens
of the longest context, D model width, K key width, V value width, E requests of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet.model import (
    Prefixes,
    changed_input,
    chosen,
    form_of,
    forward,
    fused,
    keeping_freed_memory,
    layer_on_places,
    pad,
    places_of_tokens,
    put,
    replaced,
    with_first,
)
from pmet.update.lookup_reader import Keys, LookupReader
from pmet.update.spill import Spill

HIDDEN_BYTES = 8 << 20
"""Hidden states kept in main memory from pass to pass, in bytes; the rest goes to a file."""

# Large enough for the activations of short prompts; a partitioned model's weights, which are
# gathered and freed all the time, are larger in any model where that matters.
_KEPT_BLOCK = 8 << 20
_SHARED = -1


@dataclass(frozen=True)
class _Pass:
    """One pass up through the layers.

    Attributes:
        start: the first layer that runs; everything below is unchanged since the last pass.
        layer: the layer whose keys are read.
        before: hidden states stored by the previous pass; None in the first one.
        after: hidden states that this pass stores for the next; None in the last one.
    """

    start: int
    layer: int
    before: Spill | None
    after: Spill | None


@dataclass(frozen=True)
class _Rows:
    """The input of a forward pass.

    Attributes:
        key: under which their hidden states are stored; None if they are not needed again.
        ids_BT: tokens.
        mask_BT: 1 for a token.
        ends_B: the place (row · T + column) of each row's last token.
    """

    key: int | None
    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    ends_B: torch.Tensor

    @property
    def places(self) -> torch.Tensor:
        """The places that hold tokens, (N,)."""
        return self.mask_BT.flatten().nonzero()[:, 0]

    def at_ends(self, output: torch.Tensor) -> torch.Tensor:
        """A module's input or output at each row's last token, (B, ·).

        The module may have seen all places, those that are not padding, or only the last tokens.
        """
        flat = output.reshape(-1, output.shape[-1])
        if len(flat) == self.mask_BT.numel():
            return chosen(flat, self.ends_B)
        if len(flat) == len(self.ends_B):
            return flat.clone()
        return chosen(flat, self.mask_BT.sum(1).cumsum(0) - 1)


class KeyReader(LookupReader):
    """The fast way: it skips whatever the module's description says.

    Args:
        arguments: as for `LookupReader`, and ``whole_passes``.
        memory: bytes of hidden states that may stay in main memory from pass to pass; the rest goes
            to a temporary file.
    """

    def __init__(self, *arguments: Any, memory: int = HIDDEN_BYTES, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._memory = memory
        # The form in which the family's layers return their hidden states.
        self._form: Any = None
        self._pass: _Pass | None = None
        self._prefixes: Prefixes | None = None

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """See `LookupReader.reading`; the first pass and those of the first layer start at the
        bottom."""
        before = self._pass.after if self._pass and index else None
        self._pass = _Pass(
            start=self._layers[index - 1] if before else 0,
            layer=self._layers[index],
            before=before,
            after=Spill(self._memory) if index + 1 < len(self._layers) else None,
        )
        with keeping_freed_memory(self._model, _KEPT_BLOCK):
            self._prefixes = self._run_shared()
            yield
        self._prefixes = None

    @torch.no_grad()
    def read(self, batch: int) -> tuple[Keys, torch.Tensor]:
        """See `LookupReader.read`."""
        lookups = self._batches[batch]
        ids_BT, mask_BT = pad(lookups.ids, self._device)
        row_starts_B = torch.arange(len(ids_BT), device=self._device) * ids_BT.shape[1]
        rows = _Rows(batch, ids_BT, mask_BT, row_starts_B + mask_BT.sum(1) - 1)
        contexts = torch.tensor(lookups.contexts, device=self._device)
        assert self._prefixes is not None, "no pass has begun"
        prefixes = self._prefixes.kept(contexts, room=ids_BT.shape[1])
        with self._noting(self._now.layer, rows.at_ends) as seen:
            self._run(rows, prefixes.mask_BP, prefixes.cache())
        return self._by_request(lookups, seen)

    @torch.no_grad()
    def run_along(self) -> None:
        """See `LookupReader.run_along`."""
        one = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        nothing = self._nothing(1)
        self._run(_Rows(None, one, one + 1, one[0]), nothing.mask_BP, nothing.cache())

    @torch.no_grad()
    def _run_shared(self) -> Prefixes:
        """Keys and values of the contexts' shared tokens, the last one in the last column."""
        nothing = self._nothing(len(self._shared))
        if not any(self._shared):
            return nothing
        ids_CP, mask_CP = pad(self._shared, self._device, left=True)
        # Nothing is read from them, but layer z needs some place: one that holds a token.
        longest = max(range(len(self._shared)), key=lambda c: len(self._shared[c]))
        end = (longest + 1) * ids_CP.shape[1] - 1
        rows = _Rows(_SHARED, ids_CP, mask_CP, torch.tensor([end], device=self._device))
        cache = nothing.cache(recording=True, stopping=False)
        self._run(rows, nothing.mask_BP, cache)
        padding = (mask_CP == 0)[:, None, :, None]

        # Padding may hold NaN, which attention weights of zero would still spread.
        def cleared(part: torch.Tensor) -> torch.Tensor:
            return part.masked_fill(padding.to(part.device), 0)

        layers = [
            (cleared(held.keys), cleared(held.values)) if held.keys is not None else None
            for held in cache.layers
        ]
        return Prefixes(layers, mask_CP)

    def _nothing(self, rows: int) -> Prefixes:
        mask_BP = torch.zeros(rows, 0, dtype=torch.int64, device=self._device)
        return Prefixes([None] * self._layout.depth, mask_BP)

    def _run(self, rows: _Rows, mask_BP: torch.Tensor, cache: Any) -> None:
        """One forward pass from the start layer to z, after the tokens in the cache."""
        now, z = self._now, self._layers[-1]
        model, layout = self._model, self._layout
        tokens_N = places_of_tokens(rows.mask_BT)
        with ExitStack() as stack:
            for i in range(layout.depth):
                if now.start <= i <= z:
                    behind_N = rows.ends_B if i == z else tokens_N
                    stack.enter_context(layer_on_places(model, layout, i, tokens_N, behind_N))
                else:
                    stack.enter_context(replaced(layout.layer(model, i), self._passing))
            stack.enter_context(self._handed_on(rows))
            stack.enter_context(fused(model, mask_BP.shape[1] + rows.ids_BT.shape[1]))
            stack.enter_context(self._ending())
            ids = rows.ids_BT if now.before is None else self._stand_in_embeddings(rows.ids_BT)
            forward(model, ids, torch.cat([mask_BP, rows.mask_BT], 1), cache)

    @contextmanager
    def _handed_on(self, rows: _Rows) -> Iterator[None]:
        """Feed the start layer the stored states, and store the next start layer's input."""
        now, model, layout = self._now, self._model, self._layout
        places_N = rows.places

        def start(hidden: torch.Tensor) -> torch.Tensor:
            if now.before is None:
                return hidden
            count = rows.mask_BT.numel()
            if rows.key is None:
                return hidden.new_zeros(1, 1, self._layout.value_width)
            stored_ND = now.before.get(rows.key).to(hidden.device)
            return put(stored_ND, places_N.to(hidden.device), count).reshape(
                *rows.mask_BT.shape, -1
            )

        def leave(hidden: torch.Tensor) -> torch.Tensor:
            if now.after is not None and rows.key is not None:
                now.after.put(rows.key, chosen(hidden.flatten(0, 1), places_N))
            return hidden

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self._form = form_of(output)

        handle = layout.layer(model, now.start).register_forward_hook(note)
        try:
            with (
                changed_input(layout.layer(model, now.start), start),
                changed_input(layout.layer(model, now.layer), leave),
            ):
                yield
        finally:
            handle.remove()

    def _passing(self, hidden: torch.Tensor, _args: Any, _kwargs: Any) -> Any:
        return with_first(self._form, hidden)

    def _stand_in_embeddings(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """A tensor in the embeddings' shape, for passes above them that need no embedding."""
        embedding: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        weight = self._layout.weight(self._model, self._layers[-1])
        shape = (*ids_BT.shape, embedding.embedding_dim)
        return torch.zeros(shape, dtype=weight.dtype, device=self._device)

    @property
    def _now(self) -> _Pass:
        assert self._pass is not None, "no pass has begun"
        return self._pass
