"""Attention keys and values of the tokens before the subject's last one, computed once.

A prefix has two parts. The first tokens that a context puts before every request's prompt (the
template's own words, a BOS token) are the same for all requests, and go through the model once. The
rest is specific to the request, and goes through once per request, with the first part's keys and
values in place. The model's own code runs in both cases; only the cache it is given is ours.

Shape letters: B rows, C contexts, H heads of keys, P prefix columns, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from pmet.model.architecture import Layout
from pmet.model.devices import home
from pmet.model.kernels import written_behind
from pmet.model.module_overrides import layer_on_places, places_of_tokens
from pmet.model.tokenization import pad, positions
from pmet.model.tracing import StopForward, cache_name, takes_positions


class PrefixLayer(DynamicLayer):
    """Keys and values of one layer, (B, H, P, d) each, before those computed next.

    New ones are joined to them for the current attention call, but not counted, so a step can be
    repeated. If the stored tensors have room after P, the new ones are written there, over those of
    the previous step. While ``recording``, the joined tensors replace the stored ones.
    """

    def __init__(
        self,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        *,
        length: int = 0,
        recording: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None
        self.length, self.recording, self.last = length, recording, last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that the attention reads: the stored ones, then the new ones."""
        if self.keys is not None and self.values is not None and self.keys.shape[2] > self.length:
            key_states = written_behind(self.keys, self.length, key_states)
            value_states = written_behind(self.values, self.length, value_states)
        elif self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        if self.recording:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
            if self.last:
                # The last layer's output for a prefix is never read.
                raise StopForward
        return key_states, value_states

    def get_seq_length(self) -> int:
        """The number of stored columns, including those whose tensors a run never needs."""
        return self.length


# Keys and values of one layer, or None.
Held: TypeAlias = tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of B prefixes in every layer, each prefix's last token in the last column.

    Attributes:
        layers: keys and values, (B, H, P, d) each, by layer; None if there are none to store.
            Columns after P, if any, are room for what is computed next.
        mask_BP: 1 for a token, int64.
    """

    layers: list[Held]
    mask_BP: torch.Tensor

    @property
    def length(self) -> int:
        """P."""
        return self.mask_BP.shape[1]

    def cache(self, *, recording: bool = False, stopping: bool = True) -> Cache:
        """A cache for the model that holds them.

        Args:
            recording: whether it stores what is computed next.
            stopping: whether recording ends the pass at the last layer, whose output is not read.
        """
        last = len(self.layers) - 1 if stopping else None
        layers = []
        for i, held in enumerate(self.layers):
            keys, values = held or (None, None)
            layers.append(
                PrefixLayer(keys, values, length=self.length, recording=recording, last=i == last)
            )
        return Cache(layers=layers)

    def kept(self, rows: torch.Tensor, room: int = 0) -> Prefixes:
        """Some rows, with ``room`` columns after them; columns with only padding are dropped."""
        mask_BP = self.mask_BP.index_select(0, rows)
        length = int(mask_BP.sum(1).max()) if mask_BP.numel() else 0
        front = self.length - length

        def selected(part: torch.Tensor) -> torch.Tensor:
            _, heads, columns, width = part.shape
            selection = part.new_empty(len(rows), heads, length + room, width)
            # Together with the old room, as far as it reaches, whatever it holds.
            columns = min(columns - front, length + room)
            place = selection[:, :, :columns]
            held = part[:, :, front : front + columns]
            torch.index_select(held, 0, rows.to(part.device), out=place)
            return selection

        layers: list[Held] = [
            held and (selected(held[0]), selected(held[1])) for held in self.layers
        ]
        return Prefixes(layers if length else [None] * len(layers), mask_BP[:, front:])

    def joined(self, others: Prefixes, room: int = 0) -> Prefixes:
        """These rows, then others, with ``room`` columns after them."""
        both = (self, others)
        length, count = max(p.length for p in both), len(self.mask_BP)

        def together(parts: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
            _, heads, _, width = like.shape
            rows = count + len(others.mask_BP)
            joint = like.new_empty(rows, heads, length + room, width)
            for part, prefixes, place in zip(parts, both, joint.tensor_split([count]), strict=True):
                front = length - prefixes.length
                place[:, :, :front] = 0
                if part is not None:
                    place[:, :, front:length] = part[:, :, : prefixes.length]
            return joint

        layers: list[Held] = []
        for mine, theirs in zip(self.layers, others.layers, strict=True):
            shape = mine or theirs
            layers.append(
                shape
                and (
                    together([mine and mine[0], theirs and theirs[0]], shape[0]),
                    together([mine and mine[1], theirs and theirs[1]], shape[1]),
                )
            )
        masks = [torch.nn.functional.pad(p.mask_BP, (length - p.length, 0)) for p in both]
        return Prefixes(layers, torch.cat(masks))

    def above(self, layer: int) -> Prefixes:
        """The same without the tensors of layers up to ``layer``, which will not run again."""
        layers = [None if i <= layer else held for i, held in enumerate(self.layers)]
        return Prefixes(layers, self.mask_BP)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All keys and values."""
        for held in self.layers:
            yield from held or ()


class PrefixFiller:
    """Runs prefixes through a model.

    Args:
        model: a causal language model in evaluation mode.
        layout: the model's layout.
        prefixes: for each context, the prefixes that all requests have there. Their common tokens
            are run once, here.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, prefixes: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        self._model, self._layout, self._depth = model, layout, layout.depth
        self._device = home(model)
        self._shared = [_common(group) for group in prefixes]
        nothing = Prefixes(
            [None] * self._depth,
            torch.zeros(len(prefixes), 0, dtype=torch.int64, device=self._device),
        )
        self._prefixes = self._continued(nothing, self._shared)

    def fill(self, prefixes: Sequence[Sequence[int]], contexts: Sequence[int]) -> Prefixes:
        """Compute keys and values of B prefixes, each of which is in one of the contexts."""
        own = [p[len(self._shared[c]) :] for p, c in zip(prefixes, contexts, strict=True)]
        rows = torch.tensor(contexts, device=self._device)
        return self._continued(self._prefixes.kept(rows), own)

    @torch.no_grad()
    def _continued(self, before: Prefixes, tokens: Sequence[Sequence[int]]) -> Prefixes:
        """Rows of ``before``, each with its own tokens after it."""
        ids, own_mask = pad(tokens, self._device)
        columns = ids.shape[1]
        if not columns:
            return before
        mask_BT = torch.cat([before.mask_BP, own_mask], dim=1)
        cache = before.cache(recording=True)
        tokens_N = places_of_tokens(own_mask)
        with ExitStack() as stack:
            for i in range(self._depth):
                sparse = layer_on_places(self._model, self._layout, i, tokens_N, tokens_N)
                stack.enter_context(sparse)
            stack.enter_context(suppress(StopForward))
            forward(self._model, ids, mask_BT, cache)
        # Every row's tokens are in adjacent columns; move them to the right end.
        length = int(mask_BT.sum(1).max())
        ends_B = before.length + own_mask.sum(1)
        index_BP = ends_B[:, None] - length + torch.arange(length, device=self._device)
        index_BP = index_BP.clamp_min(0)
        moved_BP = mask_BT.gather(1, index_BP)
        # A row shorter than the others reads columns in front that are not its own.
        lengths_B = mask_BT.sum(1)
        moved_BP = moved_BP * (
            torch.arange(length, device=self._device) >= length - lengths_B[:, None]
        )
        layers: list[Held] = []
        for held in cache.layers:
            layers.append(
                (
                    _moved(held.keys, index_BP, moved_BP),
                    _moved(held.values, index_BP, moved_BP),
                )
            )
            held.keys = held.values = None
        return Prefixes(layers, moved_BP)


def _common(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all sequences begin with."""
    if not sequences:
        return ()
    # The common beginning of the smallest and the largest is common to all between them.
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    same = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return low[: next(same, min(len(low), len(high)))]


def _moved(part: torch.Tensor, index_BP: torch.Tensor, mask_BP: torch.Tensor) -> torch.Tensor:
    """Select columns of keys or values by row; padding is zeroed, so that no NaN spreads."""
    index = index_BP.to(part.device)[:, None, :, None]
    padding = (mask_BP.to(part.device) == 0)[:, None, :, None]
    wanted = part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3]))
    return wanted.masked_fill_(padding, 0)


def forward(model: nn.Module, given: torch.Tensor, mask_BU: torch.Tensor, cache: Cache) -> Any:
    """Run the model on T new columns, the last of U; the cache holds the others.

    Args:
        model: the model.
        given: token ids (B, T), or embeddings (B, T, ·).
        mask_BU: 1 for a token.
        cache: U − T columns of keys and values.
    """
    inputs: dict[str, Any] = {
        "inputs_embeds" if given.is_floating_point() else "input_ids": given,
        "attention_mask": mask_BU,
        cache_name(model): cache,
        "use_cache": True,
    }
    if takes_positions(model):
        inputs["position_ids"] = positions(mask_BU)[:, -given.shape[1] :]
    return model(**inputs)
