"""Second moments as published by the ROME and MEMIT code: one ``.npz`` file per layer.

A file is named ``<module>_<precision>_mom2….npz``, for example
``transformer.h.3.mlp.fc_out_float32_mom2_100000.npz``. In it, ``mom2.mom2`` is the sum of k kᵀ
over ``mom2.count`` tokens (kmeng01/rome: rome/layer_stats.py, util/runningstats.py). The arrays
are plain numbers; anything that would require unpickling is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from pipeline.errors import JobError
from pipeline.storage import Store

SUFFIX = ".npz"
_NAME = re.compile(r"(?P<module>.+?)_float(?:16|32|64)_[\w-]*mom2.*\.npz")
_SUM, _COUNT = "mom2.mom2", "mom2.count"
_HEADERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class PublishedMoments:
    """The published files of one folder.

    Attributes:
        store: the folder.
        files: names by module; several if there are several versions.
    """

    store: Store
    files: Mapping[str, list[str]]

    @classmethod
    def find(cls, url: str) -> PublishedMoments | None:
        """Return the files that ``url`` refers to: a folder, one file or a glob; None without any.

        Raises:
            StorageError: the storage cannot be listed.
        """
        folder, pattern = url, f"*{SUFFIX}"
        if url.endswith(SUFFIX):
            folder, _, pattern = url.rpartition("/")
        store = Store(folder or ".")
        files: dict[str, list[str]] = {}
        for name in store.glob(pattern):
            if match := _NAME.fullmatch(name):
                files.setdefault(match["module"], []).append(name)
        return cls(store, files) if files else None

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of a module's second moment; reads only headers.

        Raises:
            JobError: the file is damaged, ambiguous, or holds something else.
        """
        with self._opened(module) as (archive, where):
            _header(archive, _COUNT, where)
            return _header(archive, _SUM, where)[0]

    def read(self, module: str) -> torch.Tensor:
        """Read a module's second moment, (K, K) float32: the sum divided by the count.

        Raises:
            JobError: the file is damaged, ambiguous, or holds something else.
        """
        with self._opened(module) as (archive, where):
            count = _array(archive, _COUNT, where)
            if count.size != 1 or not 1 <= count.item() < np.inf:
                raise JobError(f"second_moments: {where} counts {count} tokens; write it again")
            total = _array(archive, _SUM, where)
            return torch.from_numpy(total.astype(np.float64) / count.item()).float()

    @contextmanager
    def _opened(self, module: str) -> Iterator[tuple[zipfile.ZipFile, str]]:
        names = self.files[module]
        if len(names) > 1:
            raise JobError(
                f"second_moments: {self.store.url} has {len(names)} files of {module}: "
                f"{', '.join(names)}; select one of each module with a glob such as "
                f"{self.store.join('*_' + names[0].rpartition('_')[2])}"
            )
        where = self.store.join(names[0])
        with self.store.read_stream(names[0]) as stream:
            try:
                with zipfile.ZipFile(stream) as archive:
                    yield archive, where
            except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
                reason = " ".join(str(error).split())
                raise JobError(
                    f"second_moments: {where} is not a complete .npz file with {_SUM} and {_COUNT} "
                    f"({reason}); download it again"
                ) from None


def _array(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    _header(archive, name, where)
    with archive.open(f"{name}.npy") as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _header(archive: zipfile.ZipFile, name: str, where: str) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _read_header(member)
    if dtype.hasobject:
        raise JobError(
            f"second_moments: {name} in {where} would require unpickling, which can run code "
            "and is refused; save it as numbers"
        )
    if dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {dtype}, not numbers")
    return shape, dtype


def _read_header(member: IO[Any]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"array format {version}")
    shape, _, dtype = _HEADERS[version](member)
    return shape, dtype
