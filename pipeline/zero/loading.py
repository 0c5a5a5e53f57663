"""Opening a checkpoint with its weights partitioned by DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import ModelError
from pipeline.models import (
    Checkpoint,
    StoredTensor,
    check_values,
    open_causal_lm,
    skeleton_with_buffers,
)
from pipeline.zero.collectives import share_of_rows
from pipeline.zero.deepspeed_internals import device_of, partition
from pipeline.zero.slices import deepspeed, own_values, owned_slice

Offload = Literal["none", "cpu"]

_PIECE = 1 << 22  # elements read at a time


def load_partitioned(
    model_path: str, *, dtype: torch.dtype, offload: Offload = "none"
) -> tuple[torch.nn.Module, Any]:
    """Open a checkpoint with its weights spread over all ranks.

    Each rank reads only its own slices from the files. If the files hold weights in another form
    than the model (for example experts that are fused at load time), transformers opens them: rank
    0 then reads whole files.

    Args:
        model_path: folder of a Hugging Face causal language model.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        offload: where slices are kept: ``none`` for the device, ``cpu`` for main memory.

    Returns:
        The module, in evaluation mode, and DeepSpeed's engine around it.

    Raises:
        ModelError: the checkpoint cannot be opened, or the values this rank reads are not finite.
        ValueError: the dtype or the offload is not supported.
    """
    config = zero_config(dtype, offload)
    checkpoint = Checkpoint.open(model_path)
    module, places = skeleton_with_buffers(checkpoint, dtype)
    if all(places.values()):
        _read_slices(module, places, checkpoint, deepspeed().zero.Init(config_dict_or_path=config))
        return module, deepspeed().initialize(model=module, config=config)[0]
    return _load_with_transformers(model_path, dtype, config)


def zero_config(dtype: torch.dtype, offload: Offload = "none") -> dict[str, Any]:
    """DeepSpeed's configuration for holding weights and running them forward.

    Raises:
        ValueError: the dtype or the offload is not supported.
    """
    if offload not in ("none", "cpu"):
        raise ValueError(f"offload {offload!r} is not supported; use 'none' or 'cpu'")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{dtype} weights are not supported; use float32, bfloat16 or float16")
    # DeepSpeed's own linear function saves memory only in training, and rounds differently from
    # torch's: without it a partitioned model computes the same bits as a whole one.
    zero: dict[str, Any] = {
        "stage": 3,
        "memory_efficient_linear": False,
        # A pass uses each weight once. By default, modules needed again soon stay gathered, up to a
        # billion parameters on every rank.
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    if offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        # Without these the weights silently become float32, whatever dtype the loader is given.
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def _read_slices(
    module: nn.Module,
    places: Mapping[nn.Parameter, StoredTensor | None],
    checkpoint: Checkpoint,
    zero: Any,
) -> None:
    """Partition the parameters of a skeleton; each rank reads the values it keeps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, stored in places.items():
        assert stored is not None
        # On the CPU, memory is allocated only where something is written: this rank's slice.
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device_of(zero))
        share = share_of_rows(whole.numel(), rank, ranks)
        own = whole.view(-1)[share]
        for piece in range(0, len(own), _PIECE):
            values = torch.empty(min(_PIECE, len(own) - piece), dtype=own.dtype)
            checkpoint.read_elements(stored, share.start + piece, values)
            check_values(str(checkpoint.folder), stored.name, values)
            own[piece : piece + len(values)] = values
        made[parameter] = partitioned = nn.Parameter(whole)
        partition(zero, partitioned)
        assert owned_slice(partitioned) == (share.start, share.stop), (
            "DeepSpeed cuts parameters into other slices than these"
        )
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(owner, name, made[parameter])


def _load_with_transformers(
    model_path: str, dtype: torch.dtype, config: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Do the same as `load_partitioned` for files that rank 0 reads whole."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers keeps a weak reference: while this object lives, models it opens are partitioned.
    switch = HfDeepSpeedConfig(config)
    try:
        module = open_causal_lm(model_path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open the model at {model_path}: {error}") from error
    finally:
        del switch
    engine = deepspeed().initialize(model=module, config=config)[0]
    for name, parameter in module.named_parameters():
        check_values(model_path, name, own_values(engine, parameter))
    return module, engine
