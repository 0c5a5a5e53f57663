"""The keys and values of texts that a model will continue, for all of them in one cache.

Generation needs rows that end in the same column, so short texts have padding in front. A model
that computes the padding as well spends most of its time on it if the lengths differ: a question in
chat is several times as long as a sentence to complete. So texts are read as trees
(`pmet.evaluation.prefix_trees`), whose common beginnings occur once, and the keys and values of
each text are then copied to the end of its row. Columns in front of it are masked, and arbitrary.
Behind it there is room for what the model will say, so that no step copies the cache to extend it.

That requires a model that reads trees, and a cache that is nothing but keys and values of tokens.

Shape letters: B texts, T tokens of the longest, V vocabulary, P packs, N tokens of a pack, H heads,
d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from pmet.errors import ArchitectureError
from pmet.evaluation.prefix_trees import MOST, Pack, inputs, packed
from pmet.evaluation.prompts import Tokens
from pmet.model import batches_by_tokens, cache_name, changed_input

_HELD = ("keys", "values")
LONGEST = 2048
"""Maximum tokens of a text, and padded tokens of one forward pass."""


class _Roomy(DynamicLayer):
    """Keys and values with room for further tokens.

    Args:
        keys_BHTd: the keys.
        values_BHTd: the values.
        room: how many more tokens of each row there can be.
    """

    def __init__(self, keys_BHTd: torch.Tensor, values_BHTd: torch.Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys_BHTd, values_BHTd)
        self._whole = [functional.pad(x, (0, 0, 0, room)) for x in (keys_BHTd, values_BHTd)]
        self._show(keys_BHTd.shape[2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._whole)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values behind the others, in place; return all of them."""
        start = self.keys.shape[2]
        self._show(start + key_states.shape[2])
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._whole = [_taken(whole, indices) for whole in self._whole]
        self._show(self.keys.shape[2])


def read(model: nn.Module, ids: Sequence[Tokens], room: int) -> tuple[Any, torch.Tensor]:
    """Read texts, which may repeat.

    Args:
        model: a causal language model that reads trees.
        ids: the tokens of each text.
        room: how many tokens will be added to each.

    Returns:
        The cache, each text at the end of its row of T columns; and the logits of the next token of
        each text, (B, V).

    Raises:
        ArchitectureError: the model keeps more than keys and values, or only some of them.
    """
    columns = max(map(len, ids))
    packs = packed(set(ids), MOST)
    parts = [
        _read(model, batch, columns)
        for batch in batches_by_tokens(packs, LONGEST, lambda pack: len(pack.ids))
    ]
    row = {text: i for i, text in enumerate(text for texts, *_ in parts for text in texts)}
    order_B = torch.tensor([row[text] for text in ids])
    logits_BV = torch.cat([logits for _, logits, _ in parts])
    caches = [part for *_, part in parts]
    cache = caches[-1]
    for number in range(len(cache.layers)):
        layers = [part.layers[number] for part in caches]
        keys, values = (torch.cat([getattr(x, name) for x in layers]) for name in _HELD)
        cache.layers[number] = _Roomy(_taken(keys, order_B), _taken(values, order_B), room)
    return cache, _taken(logits_BV, order_B)


def loses_rows(cache: Any) -> bool:
    """Whether rows can be removed from a cache; states of recurrent layers have no way to."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def keep_rows(cache: Any, rows: torch.Tensor) -> None:
    """Remove the other rows from a cache that loses rows, whose layers may be on several devices.

    Args:
        cache: the cache.
        rows: the numbers of the rows to keep.
    """
    for layer in cache.layers:
        if layer.get_seq_length():
            layer.batch_select_indices(rows.to(layer.keys.device))


def _read(
    model: nn.Module, batch: Sequence[Pack], columns: int
) -> tuple[list[Tokens], torch.Tensor, Any]:
    """Read packs: their texts, the logits, and a cache with a row for each text."""
    held, head = cache_name(model), model.get_output_embeddings()  # type: ignore[operator]
    found = [(i, text, path) for i, pack in enumerate(batch) for text, path in pack.sequences]
    packs_B = torch.tensor([i for i, *_ in found])
    last_B = torch.tensor([path[-1] for *_, path in found])
    with changed_input(head, lambda hidden: _taken(hidden, packs_B, last_B)[None]):
        output = model(**inputs(model, batch, trees=True), use_cache=True)
    cache = getattr(output, held)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ArchitectureError(f"{type(cache).__name__} with other layers than DynamicLayer")
    paths_BT = torch.tensor([(0,) * (columns - len(path)) + path for *_, path in found])
    for layer in cache.layers:
        for name in _HELD:
            setattr(layer, name, _of_texts(getattr(layer, name), packs_B, paths_BT))
    return [text for _, text, _ in found], output.logits[0], cache


def _of_texts(
    held_PHNd: torch.Tensor, packs_B: torch.Tensor, paths_BT: torch.Tensor
) -> torch.Tensor:
    """The keys or values of texts in packs, (B, H, T, d)."""
    return _taken(held_PHNd.transpose(1, 2), packs_B[:, None], paths_BT).transpose(1, 2)


def _taken(tensor: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
    """The tensor at indices, which are moved to its device: layers may be on several."""
    return tensor[tuple(index.to(tensor.device) for index in indices)]
