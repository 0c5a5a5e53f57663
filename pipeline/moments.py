"""Second moments on disk: one safetensors file, and where it comes from beside it.

Tensors are named by the module whose inputs they describe, for example
``transformer.h.3.mlp.fc_out``; each is (K, K) float32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.errors import JobError
from pipeline.store import Store, read_file
from pmet.architecture import Layout
from pmet.second_moment import SecondMoments

TENSORS = "second_moments.safetensors"
PROVENANCE = "second_moments.json"
_LARGEST_HEADER = 2**24


def stored_at(url: str) -> tuple[Store, str]:
    """The store and the file that ``url``, a folder or a safetensors file, stands for."""
    if url.endswith(".safetensors"):
        folder, _, name = url.rpartition("/")
        return Store(folder or "."), name
    return Store(url), TENSORS


def write_moments(
    store: Store, moments: SecondMoments, layout: Layout, provenance: Mapping[str, Any]
) -> None:
    """Keep the means of ``moments`` in a folder; the provenance comes last and completes it."""
    tensors = {
        _module(layout, layer): mean.float().contiguous() for layer, mean in moments.means().items()
    }
    store.write_bytes(TENSORS, save(tensors))
    store.write_json(PROVENANCE, {**provenance, "tokens": moments.tokens})


def check_moments(url: str, layout: Layout, layers: tuple[int, ...], model_digest: str) -> bool:
    """Whether second moments of the edited layers are there; reads no more than a header.

    Raises:
        JobError: what is there is damaged, lacks a layer, or belongs to another model.
    """
    store, name = stored_at(url)
    if not store.exists(name):
        return False
    _check_provenance(store, name, model_digest)
    where = store.join(name)
    try:
        (length,) = struct.unpack("<Q", read_file(where, limit=8))
        header = json.loads(read_file(where, limit=8 + min(length, _LARGEST_HEADER))[8:])
        shapes = {n: tuple(e["shape"]) for n, e in header.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise JobError(
            f"second_moments: {where} is not a whole safetensors file ({error})"
        ) from None
    for layer in layers:
        _check_shape(where, layout, layer, shapes)
    return True


def read_moments(url: str, layout: Layout, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Second moments of the edited layers, (K, K) float32 each.

    Raises:
        JobError: they are damaged, or not of these layers.
    """
    store, name = stored_at(url)
    where = store.join(name)
    try:
        with store.local_copy(name) as path, safe_open(str(path), framework="pt") as tensors:
            shapes = {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
            moments = {}
            for layer in layers:
                _check_shape(where, layout, layer, shapes)
                moments[layer] = tensors.get_tensor(_module(layout, layer))
            return moments
    except (SafetensorError, OSError) as error:
        raise JobError(f"second_moments: {where} cannot be read ({error})") from None


def _module(layout: Layout, layer: int) -> str:
    return layout.family.down_projection.format(layer)


def _check_shape(
    where: str, layout: Layout, layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    module, wanted = _module(layout, layer), (layout.key_width, layout.key_width)
    if module not in shapes:
        raise JobError(
            f"second_moments: {where} lacks {module}; it has "
            f"{', '.join(sorted(shapes))[:200]}. Name another folder, or give a corpus"
        )
    if shapes[module] != wanted:
        raise JobError(
            f"second_moments: {module} in {where} is {shapes[module]}, the model's keys are "
            f"{layout.key_width} wide; it belongs to another model"
        )


def _check_provenance(store: Store, name: str, model_digest: str) -> None:
    """Refuse second moments that say they are another model's.

    A file from elsewhere says nothing; then its names and shapes must do.
    """
    if name != TENSORS or not store.exists(PROVENANCE):
        return
    said = store.read_json(PROVENANCE)
    if said.get("model") != model_digest:
        raise JobError(
            f"second_moments: {store.url} was computed on another model (digest "
            f"{str(said.get('model'))[:12]}…, this one's is {model_digest[:12]}…); name another "
            "folder"
        )
