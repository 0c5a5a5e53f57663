"""Second moments on disk: one safetensors file, and where it comes from beside it.

Tensors are named by the module whose inputs they describe, for example
``transformer.h.3.mlp.fc_out``; each is (K, K) float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.errors import JobError, StorageError
from pipeline.store import Store, read_file
from pmet.architecture import Layout
from pmet.second_moment import SecondMoments

TENSORS = "second_moments.safetensors"
PROVENANCE = "second_moments.json"


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
        layout.family.down_projection.format(layer): mean.float().contiguous()
        for layer, mean in moments.means().items()
    }
    store.write_bytes(TENSORS, save(tensors))
    store.write_json(
        PROVENANCE, {**provenance, "tokens": moments.tokens, "sha256": store.sha256(TENSORS)}
    )


def read_moments(
    url: str, layout: Layout, layers: tuple[int, ...], model_digest: str
) -> dict[int, torch.Tensor] | None:
    """Second moments of the edited layers, (K, K) float32 each; None where there are none yet.

    Raises:
        JobError: what is there is damaged, lacks a layer, or belongs to another model.
    """
    store, name = stored_at(url)
    if not store.exists(name):
        return None
    _check_provenance(store, name, model_digest)
    try:
        tensors = load(read_file(store.join(name)))
    except (SafetensorError, StorageError) as error:
        raise JobError(f"second_moments: {store.join(name)} cannot be read ({error})") from None
    moments = {}
    for layer in layers:
        module = layout.family.down_projection.format(layer)
        if module not in tensors:
            raise JobError(
                f"second_moments: {store.join(name)} lacks {module}; it has "
                f"{', '.join(sorted(tensors))[:200]}. Name another folder, or give a corpus"
            )
        if tensors[module].shape != (layout.key_width, layout.key_width):
            raise JobError(
                f"second_moments: {module} is {tuple(tensors[module].shape)}, the model's keys are "
                f"{layout.key_width} wide; it belongs to another model"
            )
        moments[layer] = tensors[module]
    return moments


def _check_provenance(store: Store, name: str, model_digest: str) -> None:
    """Refuse second moments that say they are another model's, or are not whole.

    A single file from elsewhere says nothing; then its names and shapes must do.
    """
    if name != TENSORS or not store.exists(PROVENANCE):
        return
    said = store.read_json(PROVENANCE)
    if said.get("model") not in (None, model_digest):
        raise JobError(
            f"second_moments: {store.url} was computed on another model (digest "
            f"{str(said['model'])[:12]}…, this one's is {model_digest[:12]}…); name another folder"
        )
    if said.get("sha256") not in (None, store.sha256(name)):
        raise JobError(
            f"second_moments: {store.join(name)} is not the file that its record "
            f"{json.dumps(PROVENANCE)} names; delete both and run again"
        )
