"""The files of a model folder that hold its weights: those that transformers opens.

``from_pretrained`` reads the file that ``transformers_weights`` in ``config.json`` names, else
``model.safetensors``, else the files that ``model.safetensors.index.json`` names. Any other
``.safetensors`` file is not part of the model: a backup, an adapter, another format's copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pipeline.errors import ModelError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EXPLICIT = "transformers_weights"
_LISTED = 3


class Files(Protocol):
    """The files of a model folder, on a local disk or in a `pipeline.storage.store.Store`."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def size(self, name: str) -> int:
        """The size of a file in bytes."""

    def read_stream(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A seekable file to read from."""

    def join(self, *parts: str) -> str:
        """The full path or URL of a name in the folder."""


class LocalFiles:
    """The files of a folder on a local disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self._folder / name).is_file()

    def size(self, name: str) -> int:
        """The size of a file in bytes."""
        return (self._folder / name).stat().st_size

    @contextmanager
    def read_stream(self, name: str) -> Iterator[BinaryIO]:
        """A file to read from."""
        with (self._folder / name).open("rb") as stream:
            yield stream

    def join(self, *parts: str) -> str:
        """The full path of a name in the folder."""
        return str(self._folder.joinpath(*parts))


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        names: names of the safetensors files, sorted; empty if the folder has none that is read.
        index: name of the file that lists them; None if one file holds all weights.
        weight_map: for each tensor, the file that the index names; empty without an index.
    """

    names: tuple[str, ...]
    index: str | None
    weight_map: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.names or name == self.index


def weight_files(files: Files, config: Mapping[str, Any]) -> WeightFiles:
    """Find the files that hold a model's weights.

    Args:
        files: the model folder.
        config: the contents of its ``config.json``.

    Raises:
        ModelError: the index is damaged, or a named file is missing.
    """
    name = _chosen(files, config)
    if name is None:
        return WeightFiles((), None, {})
    if not name.endswith(INDEX_SUFFIX):
        return WeightFiles((name,), None, {})
    weight_map = _weight_map(files, name)
    names = sorted(set(weight_map.values()))
    missing = [shard for shard in names if not files.exists(shard)]
    if missing:
        raise ModelError(
            f"{files.join(name)} names {len(names)} files, of which {_listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy or download the model again"
        )
    return WeightFiles(tuple(names), name, weight_map)


def _chosen(files: Files, config: Mapping[str, Any]) -> str | None:
    explicit = config.get(_EXPLICIT)
    if explicit is None:
        return next((name for name in (SINGLE, INDEX) if files.exists(name)), None)
    if not _is_plain(explicit) or not explicit.endswith((SUFFIX, INDEX_SUFFIX)):
        raise ModelError(
            f"{files.join('config.json')}: {_EXPLICIT} is {explicit!r}, not the name of a "
            "safetensors file or index beside it; correct it, or remove the key"
        )
    if not files.exists(explicit):
        raise ModelError(
            f"{files.join('config.json')}: {_EXPLICIT} names {explicit}, which is missing; copy or "
            "download the model again"
        )
    return str(explicit)


def _weight_map(files: Files, name: str) -> dict[str, str]:
    try:
        with files.read_stream(name) as stream:
            weight_map = json.loads(stream.read())["weight_map"]
        if not weight_map or not all(map(_is_plain, weight_map.values())):
            raise ValueError("weight_map gives each tensor the name of a file beside the index")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"{files.join(name)} is not an index of safetensors files ({reason}); download the "
            "model again, or write it with save_pretrained"
        ) from None
    return dict(weight_map)


def _is_plain(name: Any) -> bool:
    """Whether ``name`` is the name of a file in the folder itself."""
    return isinstance(name, str) and bool(name) and name not in (".", "..") and "/" not in name


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
