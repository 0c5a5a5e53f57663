"""Model folders: reading a base checkpoint, and publishing an edited one.

An edited checkpoint is the base's, byte for byte, with the edited tensors overwritten in place.
Nothing is loaded, gathered or renamed, so everything that was not edited stays as it was, and no
process ever holds the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.errors import ModelError, StorageError
from pipeline.models.fetching import is_gguf
from pipeline.models.weight_files import (
    INDEX_SUFFIX,
    SUFFIX,
    Files,
    LocalFiles,
    WeightFiles,
    weight_files,
)
from pipeline.storage import CHUNK_BYTES, Store, file_digest
from pmet.errors import NotFiniteError
from pmet.safetensors_header import DTYPES, Entry, read_header

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# Weights in other formats, and adapter files. Beside an edited model they would still be those of
# the base.
_OTHER_WEIGHTS = (*_PICKLES, "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "adapter_config.json")
_DIGESTED = (".json", ".safetensors", ".model", ".txt")


@dataclass(frozen=True)
class StoredTensor:
    """The location of one tensor of a checkpoint.

    Attributes:
        file: name of the safetensors file.
        name: name in that file, which may lack or add the model's prefix.
        dtype: dtype of the elements.
        shape: the stored shape.
        start: offset of the first byte in the file.
        size: bytes.
        parts: with experts that are stored one by one, a tensor for each; the other attributes but
            ``shape`` are then those of the first.
    """

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    parts: tuple[StoredTensor, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A model folder on the local disk, with its weights in safetensors.

    Attributes:
        folder: the model folder.
        tensors: floating-point tensors by their name in the files.
        headers: headers of all tensors, including types that no code here computes with.
        weights: the files that the tensors are in.
        config: the contents of ``config.json``.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    headers: Mapping[str, Entry]
    weights: WeightFiles
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of those files of a model folder that transformers reads.

        Raises:
            ModelError: there is no such folder, no configuration, no safetensors, or a damaged
                file; a file or tensor named in the index is missing, or a tensor is there twice.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {folder} has no config.json; give a Hugging Face model folder")
        files, config = LocalFiles(folder), _config(folder)
        weights = weight_files(files, config)
        if not weights.names:
            raise ModelError(f"model {folder} has no safetensors files{_instead(folder)}")
        tensors, headers = _tensors(files, weights)
        return cls(folder, tensors, headers, weights, config)

    def find(self, parameter: str, prefix: str) -> StoredTensor:
        """Return the stored tensor of a model parameter.

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
            f"model {self.folder} does not store {parameter} as a separate tensor: transformers "
            "builds it from other tensors at load time, but an edit overwrites a stored tensor; "
            "edit a model of another family"
        )

    def stored(self, parameter: str, prefix: str) -> StoredTensor | None:
        """Like `find`, but returns None if the checkpoint has no such tensor."""
        for name in (parameter, parameter.removeprefix(f"{prefix}."), f"{prefix}.{parameter}"):
            if name in self.tensors:
                return self.tensors[name]
        return None

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """Read one tensor of the checkpoint."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_elements(stored, 0, tensor.view(-1))
        return tensor

    def read_elements(self, stored: StoredTensor, first: int, out: torch.Tensor) -> None:
        """Fill ``out`` with elements of a flattened tensor, starting at element ``first``.

        Args:
            stored: the tensor.
            first: index of the first element.
            out: contiguous and on the CPU; filled, in its own dtype.

        Raises:
            ModelError: the file ends too early.
        """
        size = stored.dtype.itemsize
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.start + first * size)
            # In pieces: a copy of everything in the stored dtype would be as large as ``out``.
            for piece in out.split(CHUNK_BYTES // size):
                as_it_is = piece.dtype == stored.dtype
                read = piece if as_it_is else torch.empty(len(piece), dtype=stored.dtype)
                if file.readinto(read.view(torch.uint8).numpy().data) != read.nbytes:
                    raise ModelError(f"{file.name} was cut short while {stored.name} was read")
                if not as_it_is:
                    piece.copy_(read)

    def files(self) -> list[str]:
        """Names of the model's files, in a fixed order.

        Excludes hidden files and all weights that transformers does not read from here: other
        safetensors files, pickles, other formats, adapters.
        """
        skipped = {f for p in _OTHER_WEIGHTS for f in self.folder.glob(p)}
        return sorted(
            f.name
            for f in self.folder.iterdir()
            if f.is_file()
            and f not in skipped
            and not f.name.startswith(".")
            and (f.name in self.weights or not f.name.endswith((SUFFIX, INDEX_SUFFIX)))
        )

    def megabytes(self, name: str) -> int:
        """The size of a file, rounded up."""
        return -(-(self.folder / name).stat().st_size // 10**6)

    def digest(self) -> str:
        """SHA-256 over the names and contents of configuration, tokenizer and weights."""
        names = list(filter(is_digested, self.files()))
        with ThreadPoolExecutor() as threads:
            contents = threads.map(lambda name: file_digest(self.folder / name), names)
            return digest_of_files(dict(zip(names, contents, strict=True)))


def is_digested(name: str) -> bool:
    """Whether a file of this name is part of a model's digest."""
    return name.endswith(_DIGESTED)


def digest_of_files(digests: Mapping[str, str]) -> str:
    """The digest of a model (`Checkpoint.digest`), computed from the SHA-256 of each file."""
    listing = [[name, digests[name]] for name in sorted(digests) if is_digested(name)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def publish(
    checkpoint: Checkpoint,
    names: Collection[str],
    edited: Callable[[str, torch.Tensor], torch.Tensor],
    store: Store,
    folder: str,
    *,
    on_file: Callable[[str], None],
    without: Collection[str] = (),
) -> None:
    """Write an edited copy of ``checkpoint`` to ``folder`` of ``store``.

    Files of the same names are overwritten; the caller removes any others. ``config.json`` is
    removed first and written last, after the edited tensors have been read back from where
    transformers will look for them: an incomplete model cannot be opened.

    Args:
        checkpoint: the base.
        names: the edited tensors, as the checkpoint's files call them.
        edited: returns the new value of one of them; one is held at a time.
        store: the folder that holds the model's folder, or is it.
        folder: folder name in the store; empty if the store is the model's folder.
        on_file: called with the name of each file written.
        without: names of files to leave out.

    Raises:
        ModelError: an edited tensor has changed its shape.
        StorageError: the published files do not hold the edited tensors.
        NotFiniteError: an edited tensor holds NaN or infinity in its stored dtype.
    """
    written: dict[str, str] = {}
    within = f"{folder}/" if folder else ""
    store.delete(f"{within}config.json")
    files = [name for name in checkpoint.files() if name not in without]
    for name in sorted(files, key=lambda name: (name == "config.json", name)):
        if name == "config.json":
            published = Store(store.join(folder)) if folder else store
            _check_written(published, published.url, checkpoint.config, names, written)
        patches = [t for t in checkpoint.tensors.values() if t.file == name and t.name in names]
        with store.write_stream(f"{within}{name}") as target:
            with (checkpoint.folder / name).open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
            for stored in patches:
                tensor = edited(stored.name, checkpoint.read(stored))
                written[stored.name] = _overwrite(target, stored, tensor)
        on_file(name)


def _overwrite(target: BinaryIO, stored: StoredTensor, tensor: torch.Tensor) -> str:
    """Overwrite a stored tensor; return the SHA-256 of the new bytes."""
    data = tensor.to(stored.dtype).contiguous()
    _check_finite(stored.name, data)
    if tuple(data.shape) != stored.shape or data.nbytes != stored.size:
        raise ModelError(f"{stored.name} became {tuple(data.shape)}, it was {stored.shape}")
    target.seek(stored.start)
    content = data.view(torch.uint8).numpy().tobytes()
    target.write(content)
    return hashlib.sha256(content).hexdigest()


def _check_finite(name: str, data: torch.Tensor) -> None:
    """Refuse to publish NaN or infinity, whatever computed it: the last safeguard."""
    if not torch.isfinite(data).all():
        raise NotFiniteError(
            f"the edited tensor {name} holds NaN or infinity as {data.dtype} and is not "
            "published; lower clamp_norm_factor or v_lr in the hyper-parameters, or store the "
            "model in a wider dtype"
        )


def _check_written(
    files: Files,
    where: str,
    config: Mapping[str, Any],
    names: Collection[str],
    written: Mapping[str, str],
) -> None:
    """Raise unless transformers will find the edited tensors, bit for bit, in a written folder.

    Args:
        files: the folder, whose ``config.json`` has not been written yet.
        where: the folder's path or URL, for messages.
        config: what ``config.json`` will hold.
        names: the edited tensors.
        written: SHA-256 of each, as written.
    """
    try:
        tensors, _ = _tensors(files, weight_files(files, config))
    except ModelError as error:
        raise StorageError(f"the model published to {where} cannot be read back: {error}") from None
    wrong = [n for n in sorted(names) if _tensor_digest(files, tensors.get(n)) != written.get(n)]
    if wrong:
        raise StorageError(
            f"{where} was published without the edit of {', '.join(wrong)}: the files there do not "
            "hold what was written. It has no config.json, so it cannot be opened; check the "
            "storage, then run the same job again"
        )


def _tensor_digest(files: Files, stored: StoredTensor | None) -> str:
    """SHA-256 of a tensor's bytes as read back; empty if the tensor is missing."""
    if stored is None:
        return ""
    digest = hashlib.sha256()
    with files.read_stream(stored.file) as stream:
        stream.seek(stored.start)
        for start in range(0, stored.size, CHUNK_BYTES):
            digest.update(stream.read(min(CHUNK_BYTES, stored.size - start)))
    return digest.hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    """The contents of ``config.json``; if it is damaged, transformers reports what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _instead(folder: Path) -> str:
    """What a folder holds instead of readable weights, and what to do about it."""
    if pickles := sorted(f.name for p in _PICKLES for f in folder.glob(p)):
        return (
            f", only {', '.join(pickles[:3])}: pickle can run code and is refused; "
            "convert it with save_pretrained(safe_serialization=True)"
        )
    if others := sorted(f.name for f in folder.glob(f"*{SUFFIX}")):
        return (
            f" that transformers reads, only {', '.join(others[:3])}: it reads model.safetensors, "
            "or the files that model.safetensors.index.json names; write the model with "
            "save_pretrained"
        )
    if found := sorted(f.name for f in folder.iterdir() if is_gguf(f.name)):
        return f", only GGUF; to edit the weights of {found[0]}, name the file: {folder / found[0]}"
    return "; give a complete checkpoint"


def _tensors(
    files: Files, weights: WeightFiles
) -> tuple[dict[str, StoredTensor], dict[str, Entry]]:
    """The floating-point tensors of a model's files, and the headers of all tensors, by name.

    Raises:
        ModelError: a file is damaged, the index is wrong, or a tensor is there twice.
    """
    places: dict[str, str] = {}
    headers: dict[str, Entry] = {}
    tensors: dict[str, StoredTensor] = {}
    for file in weights.names:
        for name, entry in _file_entries(files, file).items():
            if name in places:
                raise ModelError(
                    f"{files.join(file)} and {files.join(places[name])} both store {name}, and it "
                    "is not clear which of them counts; load the model and write it with "
                    "save_pretrained"
                )
            places[name], headers[name] = file, entry
            if (stored := _stored_tensor(file, name, entry)) is not None:
                tensors[name] = stored
    for name, file in weights.weight_map.items():
        if places.get(name) != file:
            found = f"it is in {places[name]}" if name in places else "no file has it"
            raise ModelError(
                f"{files.join(weights.index or '')} says that {name} is in {file}, but {found}; "
                "download the model again, or write it with save_pretrained"
            )
    return tensors, headers


def _file_entries(files: Files, file: str) -> Mapping[str, Entry]:
    """Read only a safetensors header."""
    try:
        with files.read_stream(file) as stream:

            def first(count: int) -> bytes:
                stream.seek(0)
                return stream.read(count)

            return read_header(first, files.size(file)).tensors
    except (OSError, ValueError) as error:
        raise ModelError(f"{files.join(file)} is not a whole safetensors file ({error})") from None


def _stored_tensor(file: str, name: str, entry: Entry) -> StoredTensor | None:
    """Where a tensor is stored; None for types that no code here computes with."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return None
    return StoredTensor(file, name, dtype, entry.shape, entry.start, entry.stop - entry.start)
