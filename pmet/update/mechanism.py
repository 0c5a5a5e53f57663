"""Which way of reading keys is exact for a model: with shortcuts, or from whole prompts.

Tried on the model's miniature, like `pmet.targets.mechanism`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from pmet.model import (
    SAME,
    Family,
    Layout,
    Miniature,
    NoMiniatureError,
    RoutedKeys,
    farthest_apart,
    in_one_line,
    layers_with,
    layout_of,
    miniature_of,
)
from pmet.update.key_reader import KeyReader
from pmet.update.keys import Lookups
from pmet.update.lookup_reader import Keys, LookupReader
from pmet.update.whole_reader import WholeReader

_SHARED = ((), (3, 5), ())
# Two requests in a context of their own and in two of a group, one of which has shared tokens; then
# one more.
_BATCHES = [
    Lookups(
        array("i", [8, 2, 7, 1, 4, 6, 5, 8, 8, 2, 6]),
        array("i", [2, 3, 1, 1, 2, 2]),
        array("i", [0, 1, 2, 0, 1, 2]),
        (1, 2),
    ),
    Lookups(
        array("i", [2, 2, 7, 1, 8, 4, 3]), array("i", [4, 2, 1]), array("i", [0, 1, 2]), (1, 2)
    ),
]


def reader_kind(
    model: nn.Module, layout: Layout, *, whole_passes: bool = False
) -> type[LookupReader]:
    """The fastest exact reader of a model's keys and values."""
    shortcuts = why_read_whole(model, layout, whole_passes=whole_passes) is None
    return KeyReader if shortcuts else WholeReader


def why_read_whole(model: nn.Module, layout: Layout, *, whole_passes: bool = False) -> str | None:
    """Why keys of a model must be read from whole prompts; None if shortcuts give the same."""
    try:
        small = miniature_of(model)
    except NoMiniatureError as error:
        return f"no small copy of it can be tried ({error})"
    return _difference(small, layout.family, whole_passes)


@cache
def _difference(small: Miniature, family: Family, whole_passes: bool) -> str | None:
    edited = layers_with(small, family)[-2:]
    if not edited:
        return "its small copy has no such layers"
    own = layout_of(small.model, family, edited[-1])
    whole = _read(WholeReader, small, own, edited, whole_passes)
    try:
        fast = _read(KeyReader, small, own, edited, whole_passes)
    except Exception as error:  # noqa: BLE001 - whatever a family's code raises
        return in_one_line(error)
    apart = farthest_apart(fast, whole)
    return None if apart <= SAME else f"keys or values differ by {apart:.1e}"


@torch.no_grad()
def _read(
    kind: type[LookupReader],
    small: Miniature,
    layout: Layout,
    layers: Sequence[int],
    whole_passes: bool,
) -> list[torch.Tensor]:
    """Keys and values of every edited layer, each read after the layers before it have changed."""
    model, device = small.model, torch.device("cpu")
    reader = kind(model, layout, layers, _SHARED, _BATCHES, device, whole_passes=whole_passes)
    found: list[torch.Tensor] = []
    before = {layer: layout.weight(model, layer).clone() for layer in layers}
    try:
        for index, layer in enumerate(layers):
            with reader.reading(index):
                for batch in range(len(_BATCHES)):
                    keys, values_EV = reader.read(batch)
                    found += [_comparable(keys, _BATCHES[batch].count, layout), values_EV]
            layout.weight(model, layer).mul_(1.25)
    finally:
        for layer, weight in before.items():
            layout.weight(model, layer).copy_(weight)
    return found


def _comparable(keys: Keys, count: int, layout: Layout) -> torch.Tensor:
    """Keys as one tensor: (E, K), or (E, X, K) with experts."""
    if not isinstance(keys, RoutedKeys):
        return keys
    keys_EXK = torch.zeros(count, layout.experts, layout.key_width, dtype=keys.keys_PK.dtype)
    keys_EXK[keys.rows_P, keys.experts_P] = keys.keys_PK
    return keys_EXK
