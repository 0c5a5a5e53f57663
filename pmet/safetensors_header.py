"""Headers of safetensors files: read strictly, and written as the library writes them.

A file is eight bytes of length, a JSON object of that length, and the tensors' bytes. The library
reads a header only together with its whole local file, and writes a file only with all its tensors
in memory; here a file may be anywhere, and be written in pieces.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The types that this project computes with, by their name in a file."""
LARGEST = 100 * 2**20
"""Bytes that a header may have."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """What a file says of one tensor.

    Attributes:
        dtype: name of its type, which may be one that is not in ``DTYPES``.
        shape: its shape.
        start: offset of its first byte in the file.
        stop: offset of the first byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: what else was written into it.
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, Any]


def read_header(first: Callable[[int], bytes], size: int | None = None) -> Header:
    """Read a header and nothing else of a file.

    Args:
        first: returns the first bytes of the file, as many as it is given, fewer only where the
            file ends.
        size: of the file in bytes; None: not known, and not checked.

    Raises:
        ValueError: it is no header, is larger than ``LARGEST``, names a tensor twice, gives one of
            ``DTYPES`` other bytes than its shape needs, or lies about the end of the file.
    """
    prefix = first(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise ValueError("it is cut short")
    base = _LENGTH.size + _LENGTH.unpack(prefix)[0]
    if base - _LENGTH.size > LARGEST:
        raise ValueError("its header is too large")
    text = first(base)
    if len(text) < base:
        raise ValueError("it is cut short")
    content = _parsed(text[_LENGTH.size :])
    metadata = content.pop(_METADATA, None)
    if not isinstance(metadata, dict | None):
        raise ValueError(f"{_METADATA} in its header is no object")
    tensors = {name: _entry(name, entry, base) for name, entry in content.items()}
    end = max((entry.stop for entry in tensors.values()), default=base)
    if size is not None and end > size:
        raise ValueError("it is cut short")
    return Header(tensors, metadata or {})


def written_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a file whose tensors follow one another in the order given.

    It has the bytes that the library writes for the same tensors in the same order.

    Args:
        tensors: dtype, one of ``DTYPES``, and shape, by name.
        metadata: what else to write into it.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format wants tensors to start at multiples of eight bytes.
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError(f"its header is nested too deeply ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("its header is none")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"it names {twice} twice")
    return values


def _entry(name: str, entry: Any, base: int) -> Entry:
    if not isinstance(entry, dict):
        raise ValueError("its header is none")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise ValueError(f"{name} lacks a dtype, a shape or data_offsets")
    begin, end = offsets
    known = DTYPES.get(dtype)
    if end < begin or (known and end - begin != known.itemsize * math.prod(shape)):
        raise ValueError(f"{name} does not have the bytes that its shape needs")
    return Entry(dtype, tuple(shape), base + begin, base + end)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers, none of them negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
