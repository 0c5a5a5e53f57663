"""Which way of reading keys is exact for a model: with shortcuts, or from whole prompts.

Tried on the model's miniature, like `pmet.targets.mechanism`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import nn

from pmet.model import Layout, Miniature, NoMiniatureError, layers_with, layout_of, miniature_of
from pmet.update.key_reader import KeyReader
from pmet.update.keys import Lookups
from pmet.update.whole_reader import WholeReader

_SAME = 1e-3
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

_tried: dict[tuple[int, str, str, str, bool], str | None] = {}


def reader_for(
    model: nn.Module,
    layout: Layout,
    layers: Sequence[int],
    shared: Sequence[Sequence[int]],
    batches: Sequence[Lookups],
    device: torch.device,
    *,
    whole_passes: bool = False,
) -> KeyReader | WholeReader:
    """The fastest exact reader of keys and values; the arguments are those of `KeyReader`."""
    kind = (
        KeyReader
        if why_read_whole(model, layout, whole_passes=whole_passes) is None
        else WholeReader
    )
    return kind(model, layout, layers, shared, batches, device, whole_passes=whole_passes)


def why_read_whole(model: nn.Module, layout: Layout, *, whole_passes: bool = False) -> str | None:
    """Why keys of a model must be read from whole prompts; None if shortcuts give the same."""
    try:
        small = miniature_of(model)
    except NoMiniatureError as error:
        return f"no small copy of it can be tried ({error})"
    names = layout.family
    key = id(small), names.layer, names.attention_projection, names.down_projection, whole_passes
    if key not in _tried:
        _tried[key] = _difference(small, layout, whole_passes=whole_passes)
    return _tried[key]


def _difference(small: Miniature, layout: Layout, *, whole_passes: bool) -> str | None:
    edited = layers_with(small, layout.family)[-2:]
    if not edited:
        return "its small copy has no such layers"
    own = layout_of(small.model, layout.family, edited[-1])
    whole = _read(WholeReader, small, own, edited, whole_passes)
    try:
        fast = _read(KeyReader, small, own, edited, whole_passes)
    except Exception as error:  # noqa: BLE001 - whatever a family's code raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(whole, fast, strict=True))
    return None if apart <= _SAME else f"keys or values differ by {apart:.1e}"


@torch.no_grad()
def _read(
    kind: type[KeyReader] | type[WholeReader],
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
                    found += reader.read(batch)
            layout.weight(model, layer).mul_(1.25)
    finally:
        for layer, weight in before.items():
            layout.weight(model, layer).copy_(weight)
    return found
