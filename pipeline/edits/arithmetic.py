"""Putting Δ on a stored tensor and taking it off again, with what rounding lost.

W + Δ and W − Δ are computed in float64 and rounded once to the stored dtype, so taking Δ off does
not always return the former value. The *difference* is what is missing: former bytes XOR the bytes
that subtraction returns. It is nearly all zeros, and compresses to little.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pmet.delta import checked

_CODEC = "zstd"


@dataclass(frozen=True)
class Part:
    """An edit's part in one stored tensor.

    Attributes:
        delta: reads Δ, float64, in the stored shape.
        original: reads the values that the edit was made for, in the dtype given; None if that
            dtype cannot hold them.
    """

    delta: Callable[[], torch.Tensor]
    original: Callable[[torch.dtype], torch.Tensor | None]

    def made_for(self, dtype: torch.dtype) -> str | None:
        """SHA-256 of the values that the edit was made for; None if the dtype cannot hold them."""
        own = self.original(dtype)
        return None if own is None else sha256(own)

    def leaves(self, name: str, dtype: torch.dtype) -> str | None:
        """SHA-256 of W + Δ on the values that the edit was made for; None as for `made_for`."""
        own = self.original(dtype)
        return None if own is None else sha256(checked(name, own, self.delta()))


def put_on(name: str, value: torch.Tensor, part: Part) -> tuple[torch.Tensor, bytes | None]:
    """Return W + Δ, and the difference that taking it off again will need, if any.

    On the values that the edit was made for no difference is needed: the edit holds them.

    Raises:
        NotFiniteError: W + Δ exceeds the dtype.
    """
    delta = part.delta()
    new = checked(name, value, delta)
    own = part.original(value.dtype)
    if own is not None and torch.equal(_bytes(own), _bytes(value)):
        return new, None
    return new, _difference(value, minus(new, delta))


def taken_off(
    value: torch.Tensor, part: Part, before: str | None, kept: bytes | None
) -> tuple[torch.Tensor, bool]:
    """Return the value without an edit that was put on last, and whether it is the former one.

    Args:
        value: W + Δ.
        part: the edit's part in the tensor.
        before: SHA-256 of the former bytes, if known.
        kept: the difference from `put_on`, if there was one.
    """
    own = part.original(value.dtype)
    if own is not None and before == sha256(own):
        return own, True
    back = minus(value, part.delta())
    restored = back if kept is None else _with_difference(back, kept)
    if restored is not None and before == sha256(restored):
        return restored, True
    return back, before == sha256(back)


def minus(value: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return W − Δ, computed in float64 and rounded once to the weight's dtype."""
    return (value.double() - delta).to(value.dtype)


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()


def unit_of_largest(*tensors: torch.Tensor) -> float:
    """The distance between neighbouring numbers of the dtype at the largest of these values."""
    largest = max(float(tensor.abs().max()) for tensor in tensors)
    smallest = torch.finfo(tensors[0].dtype)
    power = math.floor(math.log2(max(largest, smallest.tiny)))
    return float(smallest.eps * 2.0**power)


def _difference(former: torch.Tensor, back: torch.Tensor) -> bytes | None:
    differing = np.bitwise_xor(_bytes(former).numpy(), _bytes(back).numpy())
    if not differing.any():
        return None
    return bytes(pa.compress(pa.py_buffer(differing), codec=_CODEC, asbytes=True))


def _with_difference(back: torch.Tensor, kept: bytes) -> torch.Tensor | None:
    """The former value; None if the difference is damaged."""
    try:
        data = pa.decompress(kept, back.nbytes, codec=_CODEC, asbytes=True)
    except OSError:
        return None
    if len(data) != back.nbytes:
        return None
    former = np.bitwise_xor(np.frombuffer(data, np.uint8), _bytes(back).numpy())
    return torch.from_numpy(former).view(back.dtype).view(back.shape)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
