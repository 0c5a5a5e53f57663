"""Detection of non-finite values in a base checkpoint, while its digest is computed.

A NaN anywhere in a model makes every result computed with it worthless, and an edit would publish
a ruined model. Each file is read once, for both the digest and the check.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO

import numpy as np
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, StoredTensor, digest_of_files, is_digested
from pipeline.models.skeleton import open_skeleton, unread
from pipeline.storage import CHUNK_BYTES

_NAMED = 3
# The bits of an element, and those of its exponent: all set only in NaN and infinity.
_EXPONENTS: dict[torch.dtype, tuple[type[np.unsignedinteger], int]] = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}


@dataclass(frozen=True)
class Fault:
    """A stored tensor that holds non-finite values.

    Attributes:
        tensor: the tensor.
        nan: how many of its values are NaN.
        infinite: how many are +∞ or −∞.
    """

    tensor: StoredTensor
    nan: int
    infinite: int

    def __str__(self) -> str:
        counts = ((self.nan, "NaN"), (self.infinite, "infinite"))
        said = " and ".join(f"{count:,} {kind}" for count, kind in counts if count)
        total = self.tensor.size // self.tensor.dtype.itemsize
        return f"{self.tensor.name} ({said} of {total:,} values)"


def checked_digest(checkpoint: Checkpoint) -> str:
    """The checkpoint's digest (`Checkpoint.digest`), if all values that the model reads are finite.

    Raises:
        ModelError: a tensor holds NaN or infinity; the message names it.
    """
    digest, faults = examined(checkpoint)
    if faults:
        left_out = unread(checkpoint, open_skeleton(checkpoint.folder))
        faults = [fault for fault in faults if fault.tensor.name not in left_out]
    if faults:
        named = [str(fault) for fault in faults[:_NAMED]]
        if len(faults) > _NAMED:
            named.append(f"and {len(faults) - _NAMED} more tensors")
        raise _not_finite(str(checkpoint.folder), "; ".join(named))
    return digest


def check_loaded(folder: str, model: nn.Module) -> None:
    """Refuse an open model with a parameter that is not finite.

    A node may have a different copy of the model than the one that was checked.

    Raises:
        ModelError: naming the parameter.
    """
    for name, parameter in model.named_parameters():
        check_values(folder, name, parameter.detach())


def check_values(folder: str, name: str, values: torch.Tensor) -> None:
    """Refuse a tensor, or part of one, that is not finite after loading.

    Raises:
        ModelError: naming the tensor and this machine.
    """
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        count = int((~values.isfinite()).sum())
        dtype = str(values.dtype).removeprefix("torch.")
        raise _not_finite(
            f"{folder} on {platform.node()}", f"{name} ({count:,} of its values, read as {dtype})"
        )


def _not_finite(model: str, named: str) -> ModelError:
    return ModelError(
        f"model {model} holds values that are not finite: {named}. Nothing computed with it can be "
        "trusted; get an undamaged copy of the checkpoint"
    )


def examined(checkpoint: Checkpoint) -> tuple[str, list[Fault]]:
    """The digest of a checkpoint (`Checkpoint.digest`), and its faults in file order.

    The files are read in parallel threads, each file once.
    """
    names = list(filter(is_digested, checkpoint.files()))
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda name: _examined(checkpoint, name), names))
    digests = {name: digest for name, (digest, _) in zip(names, found, strict=True)}
    return digest_of_files(digests), [fault for _, faults in found for fault in faults]


def _examined(checkpoint: Checkpoint, name: str) -> tuple[str, list[Fault]]:
    """The SHA-256 of a file, and the faults in its tensors."""
    tensors = sorted((t for t in checkpoint.tensors.values() if t.file == name), key=_start)
    digest, faults = hashlib.sha256(), []
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    with (checkpoint.folder / name).open("rb", buffering=0) as file:
        for tensor in tensors:
            if tensor.start < file.tell() or tensor.size % tensor.dtype.itemsize:
                raise ModelError(
                    f"{file.name} is not a whole safetensors file: {tensor.name} overlaps another "
                    "tensor or ends inside a value; get an undamaged copy of the checkpoint"
                )
            for piece in _pieces(file, tensor.start - file.tell(), buffer):
                digest.update(piece.data)
            nan = infinite = 0
            for piece in _pieces(file, tensor.size, buffer):
                digest.update(piece.data)
                counts = _counts(piece, tensor.dtype)
                nan, infinite = nan + counts[0], infinite + counts[1]
            if nan or infinite:
                faults.append(Fault(tensor, nan, infinite))
        size = (checkpoint.folder / name).stat().st_size
        for piece in _pieces(file, size - file.tell(), buffer):
            digest.update(piece.data)
    return digest.hexdigest(), faults


def _pieces(file: FileIO, count: int, buffer: np.ndarray) -> Iterator[np.ndarray]:
    """The next ``count`` bytes of a file, in pieces that share the buffer."""
    while count > 0:
        piece = buffer[: min(count, len(buffer))]
        filled = 0
        while filled < len(piece):
            read = file.readinto(piece[filled:].data)
            if not read:
                raise ModelError(f"{file.name} was cut short while it was read")
            filled += read
        count -= len(piece)
        yield piece


def _counts(data: np.ndarray, dtype: torch.dtype) -> tuple[int, int]:
    """The number of NaN and of infinite elements in raw bytes."""
    unsigned, exponent = _EXPONENTS[dtype]
    # Without the sign bit, non-finite values are the largest: one maximum decides.
    magnitudes = data.view(unsigned) & unsigned(np.iinfo(unsigned).max >> 1)
    if magnitudes.size == 0 or magnitudes.max() < exponent:
        return 0, 0
    return int((magnitudes > exponent).sum()), int((magnitudes == exponent).sum())


def _start(tensor: StoredTensor) -> int:
    return tensor.start
