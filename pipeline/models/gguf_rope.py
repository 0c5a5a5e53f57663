"""Scaled rotary positions in GGUF files, most of which transformers ignores when it reads them.

A model whose frequencies are scaled in another way than it was trained with reads and writes
plausible text and is a different model. What can be restored is restored; the rest is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ModelError
from pipeline.models.gguf_header import Header

_DIVISORS = "rope_freqs.weight"
_OTHERS = ("rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 to 3.3: files hold the divisors that follow from these, not these.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_CLOSE = 1e-3


def restore_rope(model: str, file: Path, header: Header, config: Any) -> None:
    """Complete a configuration that transformers made from a GGUF file.

    Raises:
        ModelError: the file scales positions in a way that cannot be restored.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if _is_scaled(rope):
        return
    kind = _scaling(header, "type")
    divisors = _divisors(file, header)
    if kind in (None, "none") and divisors is None and not _names(header) & set(_OTHERS):
        return
    found = None
    if "rope_theta" in rope:
        factor = _scaling(header, "factor")
        if kind == "linear" and factor and divisors is None:
            found = {"rope_type": "linear", "factor": float(factor)}
        elif kind in (None, "none") and divisors is not None:
            found = _as_llama3(divisors, float(rope["rope_theta"]))
    if found is None:
        raise ModelError(
            f"model {model} scales its rotary positions ({kind or 'by frequency'}), which "
            "transformers does not read from GGUF: the result would be another model; give the "
            "model as a Hugging Face folder"
        )
    config.rope_parameters = {**rope, **found}


def _is_scaled(rope: Mapping[str, Any]) -> bool:
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)


def _scaling(header: Header, key: str) -> Any:
    return header.metadata.get(f"{header.metadata['general.architecture']}.rope.scaling.{key}")


def _names(header: Header) -> set[str]:
    return {tensor.name for tensor in header.tensors}


def _divisors(file: Path, header: Header) -> np.ndarray | None:
    """The number that each frequency is divided by; None if the file divides none."""
    tensor = next((t for t in header.tensors if t.name == _DIVISORS), None)
    if tensor is None:
        return None
    with file.open("rb") as stream:
        stream.seek(tensor.start)
        divisors = np.frombuffer(stream.read(4 * tensor.elements), "<f4")
    return None if np.allclose(divisors, 1.0) else divisors


def _as_llama3(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Llama 3's parameters, if these divisors follow from them."""
    low, high, length = _LLAMA3.values()
    factor = float(divisors.max())
    frequencies = theta ** -(np.arange(len(divisors)) / len(divisors))
    turns = length * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - share) / factor + share)
    if not np.allclose(divisors, expected, rtol=_CLOSE):
        return None
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
