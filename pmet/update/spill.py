"""Tensors stored for later use, in main memory up to a budget and then in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import IO

import torch


@dataclass
class Spill:
    """Stores tensors by key; they may have different shapes and dtypes.

    The file has no name, and disappears with this object or its process.

    Attributes:
        memory: bytes that may stay in main memory.
    """

    memory: int
    _held: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    _filed: dict[Hashable, tuple[int, int, torch.Size, torch.dtype]] = field(default_factory=dict)
    _file: IO[bytes] | None = None

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Store a tensor, replacing the one previously stored under the key."""
        tensor = tensor.detach().contiguous()
        if tensor.nbytes <= self.memory:
            self.memory -= tensor.nbytes
            self._held[key] = tensor.to("cpu", copy=True)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        start = self._file.seek(0, 2)
        data = tensor.cpu().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        self._filed[key] = (start, tensor.nbytes, tensor.shape, tensor.dtype)

    def get(self, key: Hashable) -> torch.Tensor:
        """The tensor stored under a key, on the CPU.

        Raises:
            KeyError: no tensor is stored under it.
        """
        if key in self._held:
            return self._held[key]
        start, size, shape, dtype = self._filed[key]
        assert self._file is not None
        self._file.seek(start)
        data = bytearray(size)
        self._file.readinto(data)  # type: ignore[attr-defined]
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
