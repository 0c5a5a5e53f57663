"""Every name that this project uses of DeepSpeed beyond its documented interface.

``NAMES`` says what each is for and why no public name serves. The tests of this module look for
each of them in the DeepSpeed that is installed, so that an upgrade that removes one is noticed
there. Importing this module does not import DeepSpeed, which reads the environment on import.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

_READ = "DeepSpeed documents no way to read a rank's slice without gathering the weight"
NAMES = {
    "Parameter.ds_id": "to tell partitioned parameters from others; no public function does",
    "Parameter.ds_shape": f"to know a partitioned parameter's shape; {_READ}",
    "Parameter.ds_numel": f"to leave out the padding of the last slice; {_READ}",
    "Parameter.ds_tensor": f"to read and change this rank's slice; {_READ}",
    "Parameter.ds_process_group": f"to know which slice is this rank's; {_READ}",
    "Parameter.ds_status": "to refuse writing to a gathered weight, which would be lost; "
    "no public function tells",
    "Parameter.partition": "to partition a weight of which this rank has read only its slice; "
    "zero.Init partitions what a constructor has filled",
    "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.NOT_AVAILABLE": (
        "the value of ds_status of a weight that is not gathered"
    ),
    "deepspeed.zero.Init._convert_to_deepspeed_param": (
        "to partition parameters one at a time; zero.Init does so as a context manager only, "
        "around a constructor"
    ),
    "Init.local_device": "to place a weight on the device that DeepSpeed partitions it on",
    "deepspeed.ops.__compatible_ops__": (
        "to keep DeepSpeed from compiling a C++ extension at the start of each first run on CPUs; "
        "no setting does"
    ),
}


class Partition(NamedTuple):
    """What DeepSpeed keeps of a partitioned parameter.

    Attributes:
        shape: of the whole parameter.
        elements: how many it has, without padding.
        values: this rank's slice, flat, padding included; what is written to it stays, unless the
            parameter is gathered.
        rank: number of the slice.
        gathered: whether the parameter may be whole at the moment.
    """

    shape: torch.Size
    elements: int
    values: torch.Tensor
    rank: int
    gathered: bool


def partition_of(parameter: nn.Parameter) -> Partition | None:
    """What DeepSpeed keeps of a parameter; None where it is not partitioned."""
    if not hasattr(parameter, "ds_id"):
        return None
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    held: Any = parameter
    return Partition(
        shape=torch.Size(held.ds_shape),
        elements=held.ds_numel,
        values=held.ds_tensor.data,
        rank=dist.get_rank(group=held.ds_process_group),
        gathered=held.ds_status != ZeroParamStatus.NOT_AVAILABLE,
    )


def device_of(init: Any) -> torch.device:
    """The device that a ``deepspeed.zero.Init`` partitions weights on."""
    device: torch.device = init.local_device
    return device


def partition(init: Any, parameter: nn.Parameter) -> None:
    """Partition a parameter in place: of its values, those in this rank's slice are kept."""
    init._convert_to_deepspeed_param(parameter)
    held: Any = parameter
    held.partition()


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its collectives in shared memory for CPUs.

    Compiling takes most of a minute and needs a compiler, and a stale lock file is waited for
    without end.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
