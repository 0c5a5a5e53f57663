"""Model folders: what is in a base checkpoint, and how an edited one is published.

An edited checkpoint is the base's, byte for byte, with the edited tensors overwritten in place.
Nothing is loaded, gathered or renamed, so all that was not edited is untouched by construction,
and no process ever holds the model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.copies import is_hub_id, localized
from pipeline.errors import ModelError
from pipeline.store import CHUNK_BYTES, Store

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_DIGESTED = (".json", ".safetensors", ".model", ".txt")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies.

    Attributes:
        file: name of its safetensors file.
        name: its name there, which may lack or add the model's prefix.
        dtype: of its elements.
        shape: as stored.
        start: offset of its first byte in the file.
        size: bytes.
    """

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A model folder on the local disk, its weights in safetensors.

    Attributes:
        folder: where it is.
        tensors: floating-point tensors by their name in the files.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of a model folder.

        Raises:
            ModelError: there is no such folder, no configuration, no safetensors, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {folder} has no config.json; give a Hugging Face model folder")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [f.name for p in _PICKLES for f in folder.glob(p)]
            raise ModelError(
                f"model {folder} has no safetensors files"
                + (
                    f", only {', '.join(sorted(pickles)[:3])}: pickle can run code and is refused; "
                    "convert it with save_pretrained(safe_serialization=True)"
                    if pickles
                    else "; give a complete checkpoint"
                )
            )
        tensors = {t.name: t for file in files for t in _stored_tensors(file)}
        return cls(folder, tensors)

    def find(self, parameter: str, prefix: str) -> StoredTensor:
        """The stored tensor of a model's parameter.

        Checkpoints of the bare model leave out the prefix that the model with a head adds.

        Args:
            parameter: the parameter's name in the loaded model.
            prefix: the model's ``base_model_prefix``.

        Raises:
            ModelError: the checkpoint stores it under another name, or fused with others.
        """
        if (stored := self.stored(parameter, prefix)) is not None:
            return stored
        raise ModelError(
            f"model {self.folder} does not store {parameter} as a tensor of its own; load it and "
            "save it again with save_pretrained, then edit that copy"
        )

    def stored(self, parameter: str, prefix: str) -> StoredTensor | None:
        """As `find`; None where the checkpoint has no such tensor."""
        for name in (parameter, parameter.removeprefix(f"{prefix}."), f"{prefix}.{parameter}"):
            if name in self.tensors:
                return self.tensors[name]
        return None

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """One tensor of the checkpoint."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_elements(stored, 0, tensor.view(-1))
        return tensor

    def read_elements(self, stored: StoredTensor, first: int, out: torch.Tensor) -> None:
        """Read elements of a flattened tensor, from the ``first`` on, as many as ``out`` has.

        Args:
            stored: the tensor.
            first: number of the first element.
            out: contiguous and on the CPU; filled, in its own dtype.

        Raises:
            ModelError: the file ends before.
        """
        size = stored.dtype.itemsize
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.start + first * size)
            # In pieces: a copy in the stored dtype of all that is asked for would be as large.
            for piece in out.split(CHUNK_BYTES // size):
                as_it_is = piece.dtype == stored.dtype
                read = piece if as_it_is else torch.empty(len(piece), dtype=stored.dtype)
                if file.readinto(read.view(torch.uint8).numpy().data) != read.nbytes:
                    raise ModelError(f"{file.name} was cut short while {stored.name} was read")
                if not as_it_is:
                    piece.copy_(read)

    def files(self) -> list[str]:
        """Names of all files, in a fixed order; hidden ones and pickles are left out."""
        skipped = {f for p in _PICKLES for f in self.folder.glob(p)}
        return sorted(
            f.name
            for f in self.folder.iterdir()
            if f.is_file() and f not in skipped and not f.name.startswith(".")
        )

    def digest(self) -> str:
        """SHA-256 over the names and contents of configuration, tokenizer and weights."""
        names = [name for name in self.files() if name.endswith(_DIGESTED)]
        with ThreadPoolExecutor() as threads:
            contents = threads.map(lambda name: _file_digest(self.folder / name), names)
            return digest_of_files(dict(zip(names, contents, strict=True)))


def digest_of_files(digests: Mapping[str, str]) -> str:
    """The digest of a model (`Checkpoint.digest`) from the SHA-256 of each of its files."""
    listing = [[name, digests[name]] for name in sorted(digests) if name.endswith(_DIGESTED)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def open_model_folder(model: str, cache_dir: Path) -> Path:
    """A local folder with the model: a path, a copy of a remote folder, or a hub snapshot.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(localized(model, cache_dir))
    if path.is_dir():
        return path
    if is_hub_id(model):
        return _hub_snapshot(model)
    raise ModelError(f"model {model} is not a folder; give a model folder, a URL or a hub id")


def publish(
    checkpoint: Checkpoint,
    names: Collection[str],
    edited: Callable[[str, torch.Tensor], torch.Tensor],
    store: Store,
    folder: str,
    *,
    on_file: Callable[[str], None],
) -> None:
    """Write an edited copy of ``checkpoint`` to ``folder`` of ``store``.

    Files of the same names are overwritten; what else is there is the caller's to remove.
    ``config.json`` comes last: a model that is not whole cannot be opened.

    Args:
        checkpoint: the base.
        names: the edited tensors, as the checkpoint's files call them.
        edited: what becomes of one of them; one is held at a time.
        store: the run folder.
        folder: name in it.
        on_file: told the name of each file written.

    Raises:
        ModelError: an edited tensor has not the shape it had.
    """
    for name in sorted(checkpoint.files(), key=lambda name: (name == "config.json", name)):
        patches = [t for t in checkpoint.tensors.values() if t.file == name and t.name in names]
        with store.write_stream(f"{folder}/{name}") as target:
            with (checkpoint.folder / name).open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
            for stored in patches:
                _overwrite(target, stored, edited(stored.name, checkpoint.read(stored)))
        on_file(name)


def _overwrite(target: BinaryIO, stored: StoredTensor, tensor: torch.Tensor) -> None:
    data = tensor.to(stored.dtype).contiguous()
    if tuple(data.shape) != stored.shape or data.nbytes != stored.size:
        raise ModelError(f"{stored.name} became {tuple(data.shape)}, it was {stored.shape}")
    target.seek(stored.start)
    target.write(data.view(torch.uint8).numpy().tobytes())


def _stored_tensors(file: Path) -> Sequence[StoredTensor]:
    """Read a safetensors header (8 bytes of length, then JSON), and nothing else."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 * 2**20:
                raise ValueError("its header is too large")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = [_stored_tensor(file.name, n, e, 8 + length) for n, e in header.items()]
        end = max((t.start + t.size for t in tensors if t), default=8 + length)
        if end > file.stat().st_size:
            raise ValueError("it is cut short")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error})") from None
    return [t for t in tensors if t is not None]


def _stored_tensor(file: str, name: str, entry: Any, base: int) -> StoredTensor | None:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        return None
    return StoredTensor(file, name, dtype, tuple(entry["shape"]), base + begin, end - begin)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model {model} is no local folder, and the hub does not give it ({reason}); check the "
            "path or the id"
        ) from None
