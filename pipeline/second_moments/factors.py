"""Cholesky factors of second moments, kept beside them: they are the same every night.

A factor belongs to the very numbers it was computed from: its file is named by their digest, so one
of other second moments is never found. A folder that cannot be written to does without, and so do
second moments that a job names by a file: what lies beside that is not ours.
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
# Of ‖C x‖: rounding leaves 1e-13 or so, a jitter 1e-11.
_TOLERANCE = 1e-9


class FactorFile:
    """The place of one second moment's factor.

    Args:
        url: folder or file of the second moments.
        module: whose inputs the second moment describes.
        second_moment_KK: C.
    """

    def __init__(self, url: str, module: str, second_moment_KK: torch.Tensor) -> None:
        self._store = None if is_file_name(url) else Store(url)
        self._moment_KK = second_moment_KK
        data = second_moment_KK.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._name = f"factors/{module}-{hashlib.sha256(data.data).hexdigest()[:32]}.safetensors"

    def exists(self) -> bool:
        """Whether the factor has been kept."""
        return self._store is not None and self._store.exists(self._name)

    def read(self) -> Factor:
        """The factor that has been kept, or, where it cannot be read or is not C's, a new one.

        Raises:
            NumericalError: there is no factor.
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
        """Keep a factor; returns whether there is a folder that took it."""
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
    # In pieces: C in float64 takes twice the memory of the file.
    wanted_K = torch.cat([rows.double() @ vector_K for rows in moment_KK.split(_ROWS)])
    error_K = lower_KK @ (lower_KK.T @ vector_K) - wanted_K
    # NaN is not less than anything.
    return bool(error_K.norm() <= _TOLERANCE * wanted_K.norm())
