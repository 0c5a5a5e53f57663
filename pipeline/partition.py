"""Weights partitioned by DeepSpeed ZeRO-3: everything here, and nothing elsewhere, knows how.

Each rank keeps an equal slice of every parameter, flattened in row-major order; modules gather
their parameters when they run and let them go afterwards. That has three consequences for callers:

* every rank must run the same modules the same number of times (`padded_steps`), with hooks that
  never raise: a forward that stops half way leaves weights gathered;
* a weight is changed by writing each rank's own slice (`add_to_slice`), and only while it is not
  gathered, because a gathered weight is dropped without being written back;
* shapes are asked of `full_shape`: a partitioned parameter is itself empty.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import ModelError, WorkerError

Device = Literal["cpu", "cuda"]
Offload = Literal["none", "cpu"]
Item = TypeVar("Item")

_BACKENDS: dict[str, str] = {"cpu": "gloo", "cuda": "nccl"}
_held: set[int] = set()


class WeightSlice(NamedTuple):
    """Elements ``start`` to ``stop - 1`` of a flattened parameter; none on a rank past its end."""

    start: int
    stop: int


def init_rank(
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
    *,
    device: Device,
    timeout_s: float = 1800.0,
) -> None:
    """Join the process group. Call it first: DeepSpeed reads the environment on import.

    Args:
        rank: this process, 0 to ``world_size - 1``.
        world_size: number of ranks.
        master_addr: address where the ranks meet.
        master_port: port where they meet.
        device: ``cpu`` (gloo) or ``cuda`` (NCCL, on the one GPU that this process sees).
        timeout_s: seconds that a collective operation may wait for the other ranks.

    Raises:
        WorkerError: DeepSpeed was imported before and has chosen another kind of device.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        # Each process sees only its own GPU, as number 0.
        LOCAL_RANK="0",
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
        DS_ACCELERATOR=device,
    )
    if device == "cpu":
        interface = _interface_towards(master_addr, master_port)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    deepspeed = _deepspeed()
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device:
        raise WorkerError(
            f"DeepSpeed computes on {chosen!r} in this process, not on {device!r}; "
            f"set DS_ACCELERATOR={device} before it is imported"
        )
    if device == "cuda":
        torch.cuda.set_device(0)
    deepspeed.init_distributed(
        _BACKENDS[device],
        auto_mpi_discovery=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        verbose=False,
    )


def load_partitioned(
    model_path: str, *, dtype: torch.dtype, offload: Offload = "none"
) -> tuple[torch.nn.Module, Any]:
    """Open a checkpoint with its weights spread over all ranks.

    Rank 0 reads the files and the others receive their slices, module by module. As long as the
    engine lives, every model that transformers opens in this process is partitioned too.

    Args:
        model_path: folder of a Hugging Face causal language model.
        dtype: of the weights: float32, bfloat16 or float16.
        offload: where slices wait: ``none`` for the device, ``cpu`` for main memory.

    Returns:
        The module, in evaluation mode, and DeepSpeed's engine around it.

    Raises:
        ModelError: the checkpoint cannot be opened.
        ValueError: a dtype or an offload that is not supported.
    """
    deepspeed = _deepspeed()
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = zero_config(dtype, offload)
    switch = HfDeepSpeedConfig(config)
    try:
        # Safetensors only, as everywhere: pickle can run code.
        module = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, use_safetensors=True, local_files_only=True
        ).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open the model at {model_path}: {error}") from error
    engine = deepspeed.initialize(model=module, config=config)[0]
    # transformers only keeps a weak reference; without this one its models would forget that
    # they are partitioned.
    engine.hf_deepspeed_config = switch
    return module, engine


def zero_config(dtype: torch.dtype, offload: Offload = "none") -> dict[str, Any]:
    """DeepSpeed's configuration for holding weights and running them forward.

    Raises:
        ValueError: a dtype or an offload that is not supported.
    """
    if offload not in ("none", "cpu"):
        raise ValueError(f"offload {offload!r} is not supported; use 'none' or 'cpu'")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{dtype} weights are not supported; use float32, bfloat16 or float16")
    # DeepSpeed's own linear function saves memory in training only, and rounds differently from
    # torch's: without it a partitioned model computes the same bits as a whole one.
    zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
    if offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        # Without these the weights silently become float32, whatever the loader is told.
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ranks share the parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, gathered or not."""
    shared: Any = parameter
    return torch.Size(shared.ds_shape) if is_partitioned(parameter) else parameter.shape


def owned_slice(parameter: torch.nn.Parameter) -> WeightSlice:
    """What this rank keeps of the flattened parameter.

    The slices of all ranks tile the parameter in rank order. All have the same size but the last
    ones, whose padding is left out here; a parameter that is not partitioned is one slice.
    """
    if not is_partitioned(parameter):
        return WeightSlice(0, parameter.numel())
    shared: Any = parameter
    size, total = shared.ds_tensor.numel(), shared.ds_numel
    rank = dist.get_rank(group=shared.ds_process_group)
    return WeightSlice(min(rank * size, total), min((rank + 1) * size, total))


def add_to_slice(engine: Any, parameter: torch.nn.Parameter, delta: torch.Tensor) -> None:
    """Add this rank's part of a weight change to the weight, in place.

    ``W ← (float64(W) + Δ)``, rounded once to the weight's dtype. Needs no other rank, but the
    next forward sees a whole change only if every rank has written its part.

    Args:
        engine: of `load_partitioned`; not looked at for a parameter that is not partitioned.
        parameter: the weight.
        delta: the change of the whole weight, in its shape or flattened, or only of the elements
            in `owned_slice`; any floating dtype and device.

    Raises:
        ValueError: ``delta`` is neither as large as the weight nor as this rank's slice.
        WorkerError: the weight is gathered, so that what is written would be lost.
    """
    start, stop = owned_slice(parameter)
    flat_delta = delta.detach().reshape(-1)
    if flat_delta.numel() == full_shape(parameter).numel():
        flat_delta = flat_delta[start:stop]
    if flat_delta.numel() != stop - start:
        raise ValueError(
            f"a change of {delta.numel()} elements fits neither the weight of shape "
            f"{tuple(full_shape(parameter))} nor this rank's slice of {stop - start}"
        )
    kept = _writable_slice(engine, parameter)[: stop - start]
    change = flat_delta.to(device=kept.device, dtype=torch.float64)
    with torch.no_grad():
        kept.copy_(kept.double().add_(change))


@contextlib.contextmanager
def gathered(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Have a copy of the whole parameter, on every rank; all ranks must enter together.

    Writing to the copy changes nothing. Meant for tests and digests: it costs twice the weight.
    """
    if not is_partitioned(parameter):
        yield parameter.detach().clone()
        return
    with _deepspeed().zero.GatheredParameters([parameter]):
        _held.add(id(parameter))
        try:
            yield parameter.detach().clone()
        finally:
            _held.discard(id(parameter))


def run_forward(engine: Any, **inputs: Any) -> Any:
    """Run the module on this rank's inputs, without gradients; all ranks must do so together.

    Hooks of the module fire as on a model that is not partitioned, and see whole inputs and
    outputs; they must not raise.

    Args:
        engine: of `load_partitioned`.
        inputs: the module's; tensors are moved to its device.

    Returns:
        What the module returns.
    """
    device = _device()
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    # Not through the engine: it expects a step of an optimizer to follow.
    with torch.no_grad():
        return engine.module(**moved)


def padded_steps(steps: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest number of steps that any rank of the group has: all must run as many.

    Args:
        steps: this rank's number of forwards.
        group: the ranks that must agree; all of them if None. ``steps`` itself is returned where
            no process group exists.
    """
    if not dist.is_initialized():
        return steps
    most = torch.tensor(steps, dtype=torch.int64, device=_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most.item())


def all_rows(own: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order; each may have another number of them."""
    counts = [
        torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(own)], device=own.device))
    numbers = [int(count.item()) for count in counts]
    padded = own.new_zeros(max(numbers), *own.shape[1:])
    padded[: len(own)] = own
    every = own.new_empty(len(numbers) * len(padded), *own.shape[1:])
    dist.all_gather_into_tensor(every, padded)
    parts = every.split(len(padded)) if len(padded) else [every]
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=False)])


def in_lockstep(
    items: Sequence[Item], filler: Item, group: dist.ProcessGroup | None = None
) -> Iterator[tuple[Item, bool]]:
    """This rank's items, then the filler until every rank of the group has had as many steps.

    Yields:
        An item and True, or the filler and False: run it, and forget the result.
    """
    steps = padded_steps(len(items), group)
    for item in items:
        yield item, True
    for _ in range(steps - len(items)):
        yield filler, False


def _writable_slice(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's flat storage of a parameter, safe to write to.

    Raises:
        WorkerError: the parameter is gathered.
    """
    if not is_partitioned(parameter):
        return parameter.data.view(-1)
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    shared: Any = parameter
    if id(parameter) not in _held:
        # Weights may stay gathered after a forward: small ones, or when modules ran in another
        # order than before. What is written to the slice of such a weight is never seen.
        engine.empty_partition_cache()
        if shared.ds_status == ZeroParamStatus.NOT_AVAILABLE:
            storage: torch.Tensor = shared.ds_tensor.data
            return storage
    raise WorkerError(
        f"the weight of shape {tuple(full_shape(parameter))} is gathered, and what is written to "
        "its slice now would be lost; write between forwards, outside of gathered(…)"
    )


def _deepspeed() -> Any:
    """The library, imported late: it reads the environment on import."""
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        # Otherwise a C++ extension is compiled at the start of every first run: most of a minute,
        # a compiler needed, and a stale lock file waited for without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _device() -> torch.device:
    return torch.device(_deepspeed().accelerator.get_accelerator().current_device_name())


def _interface_towards(address: str, port: int) -> str | None:
    """The network interface that leads to an address: gloo would guess from the host's name."""
    import psutil  # type: ignore[import-untyped]

    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect((address, port))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return str(name)
    return None
