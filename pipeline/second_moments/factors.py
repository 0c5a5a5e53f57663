"""Cholesky factors of second moments, cached next to them: they stay the same every night.

A factor belongs to exactly the numbers it was computed from: its file is named by their digest, so
a factor of other second moments is never used. Read-only folders get no cache, and neither do
second moments that a job names by file, because the files next to that are not ours.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import StorageError
from pipeline.second_moments.files import is_file_name
from pipeline.storage import Store
from pmet.update import JITTERS, Factor, moment_factor

_TENSOR = "lower"
_ROWS = 1024
# Relative to ‖C x‖: rounding leaves about 1e-13, a jitter 1e-11.
_TOLERANCE = 1e-9


class FactorFile:
    """The location of one second moment's factor.

    Args:
        url: folder or file of the second moments.
        module: the module whose inputs the second moment describes.
        second_moment_KK: C.
    """

    def __init__(self, url: str, module: str, second_moment_KK: torch.Tensor) -> None:
        self._store = None if is_file_name(url) else Store(url)
        self._moment_KK = second_moment_KK
        data = second_moment_KK.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._name = f"factors/{module}-{hashlib.sha256(data.data).hexdigest()[:32]}.safetensors"

    def exists(self) -> bool:
        """Whether the factor is cached."""
        return self._store is not None and self._store.exists(self._name)

    def read(self) -> Factor:
        """Read the cached factor; if it cannot be read or is not C's, compute a new one.

        Raises:
            NumericalError: C has no factor.
        """
        assert self._store is not None
        try:
            with (
                self._store.local_copy(self._name) as path,
                safe_open(str(path), framework="pt") as kept,
            ):
                jitter = float((kept.metadata() or {})["jitter"])
                lower_KK = kept.get_tensor(_TENSOR)
        except (StorageError, SafetensorError, OSError, KeyError, ValueError):
            return moment_factor(self._moment_KK)
        found = Factor(lower_KK, jitter)
        return found if _is_factor(found, self._moment_KK) else moment_factor(self._moment_KK)

    def keep(self, found: Factor) -> bool:
        """Cache a factor; return whether the folder could take it."""
        if self._store is None:
            return False
        try:
            with self._store.local_target(self._name) as path:
                metadata = {"jitter": repr(found.jitter)}
                save_file({_TENSOR: found.lower.cpu().contiguous()}, str(path), metadata=metadata)
        except (StorageError, OSError):
            return False
        return True


def _is_factor(found: Factor, moment_KK: torch.Tensor) -> bool:
    """Whether L Lᵀ is C, for one random vector: K² operations, not K³."""
    lower_KK = found.lower
    if (
        found.jitter not in (0.0, *JITTERS)
        or lower_KK.shape != moment_KK.shape
        or lower_KK.dtype != torch.float64
    ):
        return False
    random = torch.Generator().manual_seed(0)
    vector_K = torch.randn(len(lower_KK), generator=random, dtype=torch.float64)
    # In pieces: all of C in float64 takes twice the memory of the file.
    wanted_K = torch.cat([rows.double() @ vector_K for rows in moment_KK.split(_ROWS)])
    error_K = lower_KK @ (lower_KK.T @ vector_K) - wanted_K
    # NaN compares false.
    return bool(error_K.norm() <= _TOLERANCE * wanted_K.norm())
