"""The header of a GGUF file: metadata and where each tensor is, without the tensors themselves.

Every length in the file is checked against the file's size before it is used: the readers of other
packages trust these lengths, and run out of memory or never end on a damaged file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# The scalar types of metadata values, by their numbers in the format.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_ALIGNMENT = 32
_MOST_DIMENSIONS = 8


class DamagedError(ValueError):
    """The bytes of a file contradict the format; the message says where."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file.

    Attributes:
        name: its name in the file.
        shape: its shape in the order of torch: the dimension that varies fastest comes last.
        type: number of its data type in the format, such as 3 for Q4_1.
        start: offset of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: single values by key; of an array, its length.
        tensors: all tensors, in the file's order.
        size: bytes of the file.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    size: int


def read_gguf_header(file: Path) -> Header:
    """Read a file's header.

    Raises:
        DamagedError: it is no GGUF file of version 2 or 3, or damaged.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(MAGIC))
        if start != MAGIC:
            found = repr(start.decode("latin-1")) if start else "nothing"
            raise DamagedError(f"it starts with {found}, not with 'GGUF'")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, size).header()
            except RecursionError:
                raise DamagedError("its metadata nests arrays too deeply") from None


class _Reader:
    """Reads a header from the first byte on."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self._size, self._at = data, size, len(MAGIC)

    def header(self) -> Header:
        version = self._one("<I")
        if version not in _VERSIONS:
            raise DamagedError(f"it has version {version}, not 2 or 3")
        tensors, values = self._one("<Q"), self._one("<Q")
        metadata = {}
        for _ in range(values):
            key = self._string()
            metadata[key] = self._value(self._one("<I"))
        table = [self._tensor() for _ in range(tensors)]
        return Header(metadata, self._placed(table, metadata), self._size)

    def _one(self, layout: str) -> Any:
        self._need(struct.calcsize(layout))
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return value

    def _need(self, count: int) -> None:
        if count > self._size - self._at:
            raise DamagedError(f"its header goes on past the end of its {self._size:,} bytes")

    def _string(self) -> str:
        length = self._one("<Q")
        self._need(length)
        text = self._data[self._at : self._at + length]
        self._at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise DamagedError(f"its text before byte {self._at:,} is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise DamagedError(f"its value before byte {self._at:,} has the unknown type {kind}")
        return self._one(_SCALARS[kind])

    def _array(self) -> int:
        kind, length = self._one("<I"), self._one("<Q")
        if kind in _SCALARS:
            size = length * struct.calcsize(_SCALARS[kind])
            self._need(size)
            self._at += size
            return int(length)
        # Each element takes at least the eight bytes of its length.
        self._need(8 * length)
        for _ in range(length):
            self._value(kind)
        return int(length)

    def _tensor(self) -> Tensor:
        name, dimensions = self._string(), self._one("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise DamagedError(f"its tensor {name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self._one("<Q") for _ in range(dimensions))
        return Tensor(name, shape[::-1], self._one("<I"), self._one("<Q"))

    def _placed(self, table: list[Tensor], metadata: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors with their offsets in the file, which the table counts from its own end."""
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise DamagedError(f"its general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        return tuple(Tensor(t.name, t.shape, t.type, base + t.start) for t in table)
