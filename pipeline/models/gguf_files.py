"""GGUF files as models: dequantised once into an ordinary checkpoint, which a cache keeps.

The checkpoint holds float32 weights, the tokenizer and the chat template, and is found again by the
file's content. Its folder gets its final name when it is complete, with a hidden record of the
quantisation, which is not part of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock

from pipeline.errors import ModelError, StorageError
from pipeline.models.fetching import localized_file, rename_unless_there
from pipeline.models.gguf_header import DamagedError, Header, Tensor, read_gguf_header
from pipeline.models.gguf_rope import restore_rope
from pipeline.models.skeleton import NO_CODE, UNREADABLE, model_class
from pipeline.storage import (
    TEMPORARY_SUFFIX,
    cache_failures,
    failures,
    file_digest,
    make_cache,
)
from pmet.model import transformers_internals

# Increased when the same file would become another checkpoint.
_FORMAT = 1
_RECORD = ".dequantised.json"
_TOKENS = "tokenizer.ggml.tokens"
# Types whose blocks hold values at equal distances, with the length over which the distance is one.
_EVEN = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"), 32),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), 16),
}
_PLAIN = ("F32", "F16", "BF16")
_SAMPLED_TENSORS, _SAMPLED_BLOCKS = 16, 2048
_FOLDER = "give the model as a Hugging Face folder, or another GGUF file of it"
_REASON_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the weights of a model were stored in the GGUF file that it was made from.

    Attributes:
        type: the type of most weights, such as ``Q4_1``.
        bits: mean number of bits per weight.
        rounding: root mean square of the rounding that this type caused, as a share of that of the
            weights, estimated from the distances between stored values; None if unknown.
    """

    type: str
    bits: float
    rounding: float | None

    @property
    def sentence(self) -> str:
        """What the file held, and what that means for an edit."""
        if self.type in _PLAIN:
            return f"converted from GGUF ({self.type}, not quantised)"
        cost = "" if self.rounding is None else f", rounded by about {self.rounding:.1%} (rms)"
        return (
            f"dequantised from GGUF (mostly {self.type}, {self.bits:.1f} bits a weight{cost}); "
            "edits and figures are those of the dequantised weights, and the original model may "
            "answer differently"
        )


def folder_of_gguf(model: str, cache_dir: Path) -> Path:
    """Return the folder of the checkpoint made from a GGUF file, made now if it is not cached.

    Args:
        model: path or URL of the file.
        cache_dir: where checkpoints and copies of remote files are kept.

    Raises:
        ModelError: there is no such file, it is damaged, or it holds something that cannot be
            turned into a checkpoint; the message says which.
        StorageError: it cannot be copied, or the cache cannot be written to.
    """
    file = _local(model, cache_dir)
    header = _header(model, file)
    make_cache(cache_dir)
    folder = cache_dir / _key(file)
    # Later processes wait, and find the checkpoint there.
    with cache_failures(cache_dir):
        lock = FileLock(cache_dir / f"{folder.name}.lock")
        lock.acquire()
    try:
        # Before it is looked for: a folder that has just been used is not removed.
        with suppress(FileNotFoundError):
            os.utime(folder)
        if not (folder / _RECORD).is_file():
            _check(model, header)
            _make(model, file, header, folder)
    finally:
        lock.release()
    return folder


def quantisation_of(folder: Path) -> Quantisation | None:
    """How the weights were stored in the GGUF file that a folder was made from; None for others."""
    record = folder / _RECORD
    if not record.is_file():
        return None
    return Quantisation(**json.loads(record.read_bytes())["quantisation"])


def _local(model: str, cache_dir: Path) -> Path:
    try:
        file = localized_file(model, cache_dir)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ModelError(f"there is no GGUF file at {model}; check the URL") from None
        raise
    if file.is_dir():
        raise ModelError(f"model {model} is a folder; name the GGUF file in it")
    if not file.is_file():
        raise ModelError(
            f"there is no GGUF file {model}; check the path, or give a URL, such as "
            "hf://owner/name/file.gguf for one on the hub"
        )
    return file


def _header(model: str, file: Path) -> Header:
    try:
        return read_gguf_header(file)
    except DamagedError as error:
        raise ModelError(
            f"model {model} is not a whole GGUF file: {error}; copy or download it again"
        ) from None
    except OSError as error:
        raise ModelError(f"model {model} cannot be read ({error.strerror})") from None


def _key(file: Path) -> str:
    return hashlib.sha256(f"gguf {_FORMAT} {file_digest(file)}".encode()).hexdigest()[:32]


def _check(model: str, header: Header) -> None:
    """Refuse a file that cannot become a checkpoint, as far as its header shows."""
    if find_spec("gguf") is None:
        raise ModelError(
            f"model {model}: reading GGUF files needs the package gguf; "
            "pip install 'pmet-pipeline[real]'"
        )
    if (parts := header.metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"model {model} is one of {parts} parts of a model; join them into one file, with "
            "llama-gguf-split --merge"
        )
    _check_architecture(model, header)
    if not header.metadata.get(_TOKENS):
        raise ModelError(f"model {model} has no tokenizer inside ({_TOKENS}); {_FOLDER}")
    for tensor in header.tensors:
        _check_tensor(model, header, tensor)


def _check_architecture(model: str, header: Header) -> None:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"model {model} does not name its architecture; {_FOLDER}")
    known = transformers_internals.gguf_architectures()
    # Files write qwen2moe and gpt-oss where the list has qwen2_moe and gpt_oss.
    spellings = {name.replace("_", ""): name for name in known}
    if architecture.replace("-", "").replace("_", "") not in spellings:
        raise ModelError(
            f"model {model} has the architecture {architecture!r}, which the installed "
            f"transformers cannot read from GGUF (it reads {', '.join(sorted(known))}); give the "
            "model as a Hugging Face folder"
        )


def _check_tensor(model: str, header: Header, tensor: Tensor) -> None:
    _, length, size = _blocks(model, tensor)
    row = tensor.shape[-1] if tensor.shape else 1
    if row % length:
        raise ModelError(
            f"model {model} is damaged: {tensor.name} has rows of {row} elements in blocks of "
            f"{length}; copy or download it again"
        )
    missing = tensor.start + tensor.elements // length * size - header.size
    if missing > 0:
        raise ModelError(
            f"model {model} was cut short: {tensor.name} ends {missing:,} bytes after the end of "
            "the file; copy or download it again"
        )


def _blocks(model: str, tensor: Tensor) -> tuple[Any, int, int]:
    """A tensor's type, as gguf names it, and the elements and bytes of one of its blocks."""
    import gguf

    name = f"number {tensor.type}"
    try:
        kind = gguf.GGMLQuantizationType(tensor.type)
        name = kind.name
        length, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise ModelError(
            f"model {model} stores {tensor.name} in the type {name}, which the installed gguf "
            f"cannot dequantise; upgrade gguf, or {_FOLDER}"
        ) from None
    return kind, length, size


def _make(model: str, file: Path, header: Header, folder: Path) -> None:
    """Write the checkpoint of a GGUF file to ``folder``, which appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with _alone(file, folder.parent) as source, _quietly():
            opened, tokenizer = _opened(model, source)
        restore_rope(model, file, header, opened.config)
        plain, found = _plain(opened), _measured(model, file, header)
        with failures("write", str(partial)), _quietly():
            partial.mkdir()
            plain.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            record = {"format": _FORMAT, "quantisation": asdict(found)}
            (partial / _RECORD).write_text(json.dumps(record))
            rename_unless_there(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Within: drop what the libraries print, progress bars that have no setting among it."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


@contextmanager
def _alone(file: Path, cache: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers also reads the files beside it."""
    folder = cache / f"{uuid4().hex}{TEMPORARY_SUFFIX}"
    try:
        with cache_failures(cache):
            folder.mkdir()
            (folder / "model.gguf").symlink_to(file.resolve())
        yield folder / "model.gguf"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _opened(model: str, file: Path) -> tuple[Any, Any]:
    """The model of a file in float32, and its tokenizer."""
    import transformers

    where, name = str(file.parent), {"gguf_file": file.name}
    try:
        config = transformers.AutoConfig.from_pretrained(where, **name, **NO_CODE)
        _check_kind(model, config)
        # Newer releases keep weights in blocks unless they are asked not to.
        blocks = getattr(transformers, "GgufConfig", None)
        options = {} if blocks is None else {"quantization_config": blocks(dequantize=True)}
        opened, loading = model_class(config).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            **name,
            **options,
            **NO_CODE,
        )
        # Given the configuration, it does not read it from the file once more, which takes seconds.
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, config=config, **name)
    except (*UNREADABLE, RuntimeError, LookupError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).replace(where, "").split())[:_REASON_SHOWN]
        raise ModelError(
            f"model {model} cannot be read with transformers ({reason}); {_FOLDER}"
        ) from None
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model {model} has no weights for {missing[0]}{more}, which would be filled with "
            f"random numbers; {_FOLDER}"
        )
    return opened, tokenizer


def _check_kind(model: str, config: Any) -> None:
    kind = config.model_type
    reads_images = transformers_internals.reads_images(kind)
    if not (transformers_internals.is_causal_type(kind) or reads_images):
        raise ModelError(
            f"model {model} is no causal language model ({kind}); edit a model that continues text"
        )


def _plain(opened: Any) -> Any:
    """The same model without traces of quantisation: a model opened from GGUF cannot be saved."""
    config = opened.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    with torch.device("meta"):
        plain = type(opened)(config)
    plain.load_state_dict(opened.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _measured(model: str, file: Path, header: Header) -> Quantisation:
    """The quantisation of a file, its rounding estimated from a sample of the weights."""
    import gguf

    weights: Counter[str] = Counter()
    bits = 0.0
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) > 1]
    for tensor in matrices:
        kind, length, size = _blocks(model, tensor)
        weights[kind.name] += tensor.elements
        bits += 8.0 * size * tensor.elements / length
    ((most, _),) = weights.most_common(1) or [("F32", 0)]
    kind = gguf.GGMLQuantizationType[most]
    chosen = [tensor for tensor in matrices if tensor.type == kind]
    chosen = chosen[:: -(-len(chosen) // _SAMPLED_TENSORS)]
    rounding = _rounding(file, chosen, kind) if most in _EVEN else None
    return Quantisation(type=most, bits=bits / max(1, weights.total()), rounding=rounding)


def _rounding(file: Path, tensors: list[Tensor], kind: Any) -> float | None:
    """Estimate the rms of a type's rounding, as a share of the weights' rms.

    Rounding to values at a distance s moves a weight by s/√12 in the root mean square. The distance
    is the smallest one between two stored values of a block.
    """
    import gguf

    length, size = gguf.GGML_QUANT_SIZES[kind]
    rounded = squares = 0.0
    with file.open("rb") as stream:
        for tensor in tensors:
            stream.seek(tensor.start)
            read = stream.read(min(tensor.elements // length, _SAMPLED_BLOCKS) * size)
            blocks = np.frombuffer(read, np.uint8).reshape(-1, size)
            values = np.sort(gguf.dequantize(blocks, kind).reshape(-1, _EVEN[kind.name]), axis=1)
            steps = np.diff(values.astype(np.float64), axis=1)
            steps[steps <= 1e-6 * np.abs(values).max(axis=1, keepdims=True)] = np.inf
            step = steps.min(axis=1)
            rounded += values.shape[1] * float(np.square(step[np.isfinite(step)]).sum()) / 12
            squares += float(np.square(values.astype(np.float64)).sum())
    return float(np.sqrt(rounded / squares)) if squares else None
