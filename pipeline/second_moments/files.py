"""Second moments on disk: one safetensors file, and a JSON file with its provenance.

Each tensor is named by the module whose inputs it describes, for example
``transformer.h.3.mlp.fc_out``, and is (K, K) float32; (X, K, K) for a module of X experts. The
published ``.npz`` files can be read too (``pipeline.second_moments.published``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import JobError
from pipeline.second_moments.published import SUFFIX as NPZ
from pipeline.second_moments.published import PublishedMoments
from pipeline.storage import Store, read_file
from pmet import safetensors_header
from pmet.errors import NotFiniteError
from pmet.model import Layout
from pmet.safetensors_header import Header

TENSORS = "second_moments.safetensors"
PROVENANCE = "second_moments.json"
SAFETENSORS = ".safetensors"
_KEY = "key"


def is_file_name(url: str) -> bool:
    """Whether ``url`` names a file of second moments rather than a folder to keep them in."""
    return url.endswith((SAFETENSORS, NPZ))


def module_name(layout: Layout, layer: int) -> str:
    """The name of a layer's second moment in files: the module whose input it describes."""
    return layout.family.down_projection.format(layer)


@contextmanager
def moments_writer(
    store: Store, layout: Layout, layers: Sequence[int], key: str
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Write the tensors to a folder: call the yielded function with each layer's mean, in order.

    With experts, with each expert's in turn. Only one mean has to be in memory. The file records
    the ``key`` it was made under; without a provenance file it counts as unfinished.

    Raises:
        NotFiniteError: from the yielded function, if a mean overflows float32; no file is left.
    """
    width, shape = layout.key_width, layout.moment_shape
    tensors = {module_name(layout, layer): (torch.float32, shape) for layer in layers}
    with store.write_stream(TENSORS) as stream:
        stream.write(safetensors_header.written_header(tensors, {_KEY: key}))

        def write(mean_KK: torch.Tensor) -> None:
            assert mean_KK.shape == (width, width)
            mean_KK = mean_KK.float()
            if not _is_finite(mean_KK):
                raise NotFiniteError(
                    f"a second moment for {store.url} is not finite in float32; the model's "
                    "activations on the corpus overflow: check the model and the corpus"
                )
            stream.write(mean_KK.contiguous().cpu().numpy().data)

        yield write


def check_moments(url: str, layout: Layout, layers: tuple[int, ...], model_digest: str) -> bool:
    """Check that second moments of the edited layers exist; reads only headers.

    Raises:
        JobError: the file is damaged, lacks a layer, or belongs to another model.
    """
    store, name = _stored_at(url)
    if url.endswith(NPZ) or not store.exists(name):
        published = PublishedMoments.find(url)
        if published is not None:
            _published_modules(published, layout, layers)
        return published is not None
    header = read_header(store, name)
    if name == TENSORS and store.exists(PROVENANCE):
        _check_provenance(store, model_digest)
    elif made_under(header) and not is_file_name(url):
        # Made here, but interrupted before its provenance was written; other files have no key.
        return False
    _check_fit(store.join(name), header, layout, layers)
    return True


def read_moments(url: str, layout: Layout, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Read second moments of the edited layers, (K, K) or (X, K, K) float32 each.

    Raises:
        JobError: they are damaged, not finite, or not of these layers.
    """
    found = _read(url, layout, layers)
    for layer, moment_KK in found.items():
        _check_finite(url, module_name(layout, layer), moment_KK)
    return found


def refuse_not_finite(url: str, layout: Layout, layers: tuple[int, ...]) -> None:
    """Check that second moments on this machine are finite, reading one layer at a time; those at
    a remote URL are checked by each rank that reads them.

    Raises:
        JobError: as for `read_moments`.
    """
    if _stored_at(url)[0].local_path() is not None:
        for layer in layers:
            read_moments(url, layout, (layer,))


def _check_finite(url: str, module: str, moment_KK: torch.Tensor) -> None:
    if not _is_finite(moment_KK):
        raise JobError(
            f"second_moments: {module} at {url} holds NaN or infinity; copy the file again, or "
            "recompute it from a corpus"
        )


def _is_finite(moment_KK: torch.Tensor) -> bool:
    # Two numbers instead of a mask as large as the matrix.
    return bool(torch.stack(moment_KK.aminmax()).isfinite().all())


def _read(url: str, layout: Layout, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    store, name = _stored_at(url)
    if url.endswith(NPZ) or not store.exists(name):
        published = PublishedMoments.find(url)
        if published is None:
            raise JobError(f"second_moments: there is nothing at {url}; correct the path")
        modules = _published_modules(published, layout, layers)
        return {layer: published.read(m) for layer, m in zip(layers, modules, strict=True)}
    _check_fit(store.join(name), read_header(store, name), layout, layers)
    try:
        with store.local_copy(name) as path, safe_open(str(path), framework="pt") as tensors:
            return {layer: tensors.get_tensor(module_name(layout, layer)) for layer in layers}
    except (SafetensorError, OSError) as error:
        raise JobError(f"second_moments: {store.join(name)} cannot be read ({error})") from None


def read_header(store: Store, name: str) -> Header:
    """The header of a safetensors file of second moments.

    Raises:
        JobError: it is not a safetensors file, or it is cut short.
    """
    where = store.join(name)
    try:
        return safetensors_header.read_header(
            lambda count: read_file(where, limit=count), store.size(name)
        )
    except ValueError as error:
        raise JobError(
            f"second_moments: {where} is not a whole safetensors file ({error})"
        ) from None


def made_under(header: Header) -> str | None:
    """The key that a file was made under; None for a file from elsewhere."""
    key = header.metadata.get(_KEY)
    return key if isinstance(key, str) else None


def _stored_at(url: str) -> tuple[Store, str]:
    """The store and file name for ``url``, a folder or a safetensors file."""
    if url.endswith(SAFETENSORS):
        folder, _, name = url.rpartition("/")
        return Store(folder or "."), name
    return Store(url), TENSORS


def _check_fit(where: str, header: Header, layout: Layout, layers: tuple[int, ...]) -> None:
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    for layer in layers:
        module = module_name(layout, layer)
        _check_present(where, module, shapes)
        _check_shape(where, module, shapes[module], layout)


def _published_modules(
    published: PublishedMoments, layout: Layout, layers: tuple[int, ...]
) -> list[str]:
    """The modules of the edited layers, checked."""
    modules = [module_name(layout, layer) for layer in layers]
    where = published.store.url
    for module in modules:
        _check_present(where, module, published.files)
        _check_shape(where, module, published.shape(module), layout)
    return modules


def _check_present(where: str, module: str, there: Mapping[str, Any]) -> None:
    if module not in there:
        raise JobError(
            f"second_moments: {where} lacks {module}; it has "
            f"{', '.join(sorted(there))[:200]}. Name another folder, or give a corpus"
        )


def _check_shape(where: str, module: str, shape: tuple[int, ...], layout: Layout) -> None:
    if shape != layout.moment_shape:
        raise JobError(
            f"second_moments: {module} in {where} is {shape}, but the model's keys "
            f"{layout.of_keys}; it belongs to another model"
        )


def _check_provenance(store: Store, model_digest: str) -> None:
    """Refuse second moments whose provenance names another model."""
    said = store.read_json(PROVENANCE)
    if said.get("model") != model_digest:
        raise JobError(
            f"second_moments: {store.url} was computed on another model (digest "
            f"{str(said.get('model'))[:12]}…, this one's is {model_digest[:12]}…); name another "
            "folder"
        )
