"""A LoRA adapter in the files of PEFT.

All weights get the largest of their ranks, the others' factors filled up with zeros: servers
allocate one rank per adapter, and not all of them read ``rank_pattern``. ``lora_alpha`` equals the
rank, so that B·A is added as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipeline.export.factors import DTYPE, FactoredWeight
from pipeline.storage import Store
from pmet.safetensors_header import written_header

ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def rank_of(weights: Sequence[FactoredWeight]) -> int:
    """The rank of the adapter."""
    return max(1, *(weight.rank for weight in weights))


def adapter_config(base: str, weights: Sequence[FactoredWeight]) -> dict[str, Any]:
    """The contents of ``adapter_config.json``.

    Args:
        base: the base model, as the job names it.
        weights: the factored weights.
    """
    rank = rank_of(weights)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(weight.target.transposed for weight in weights),
        "target_modules": sorted(weight.target.module for weight in weights),
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def adapter_bytes(weights: Sequence[FactoredWeight]) -> int:
    """The size of all factors in bytes."""
    return DTYPE.itemsize * rank_of(weights) * sum(map(sum, (w.shape for w in weights)))


def write_weights(store: Store, weights: Sequence[FactoredWeight]) -> Iterator[FactoredWeight]:
    """Write ``adapter_model.safetensors``; yields each weight whose factors have been written.

    The factors of one weight are in memory at a time.
    """
    rank = rank_of(weights)
    tensors = {}
    for weight in weights:
        right, left = _names(weight)
        tensors[right] = (DTYPE, (rank, weight.shape[1]))
        tensors[left] = (DTYPE, (weight.shape[0], rank))
    with store.write_stream(WEIGHTS) as stream:
        stream.write(written_header(tensors, {"format": "pt"}))
        for weight in weights:
            left_VR, right_RK = weight.factors()
            missing = rank - weight.rank
            stream.write(_bytes(torch.nn.functional.pad(right_RK, (0, 0, 0, missing))))
            stream.write(_bytes(torch.nn.functional.pad(left_VR, (0, missing))))
            yield weight


def _names(weight: FactoredWeight) -> tuple[str, str]:
    module = f"{_PREFIX}{weight.target.module}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
