"""Weights partitioned by DeepSpeed ZeRO-3: only this module and `pipeline.zero.loading` know how.

Each rank keeps an equal slice of every parameter, flattened in row-major order; modules gather
their parameters when they run and free them afterwards. That has three consequences for callers:

* every rank must run the same modules the same number of times (`pipeline.zero.collectives`), with
  hooks that never raise: an interrupted forward leaves weights gathered;
* a weight is changed by writing each rank's own slice (`add_block`), and only while it is not
  gathered, because a gathered weight is dropped without being written back;
* use `full_shape` for shapes: a partitioned parameter is itself empty.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import socket
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pipeline.errors import WorkerError
from pipeline.zero.deepspeed_internals import compile_nothing, partition_of

Device = Literal["cpu", "cuda"]

_PIECE = 1 << 22  # elements of a weight changed at a time, in float64
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
        WorkerError: DeepSpeed was imported earlier and has chosen another kind of device.
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
    library = deepspeed()
    chosen = library.accelerator.get_accelerator().device_name()
    if chosen != device:
        raise WorkerError(
            f"DeepSpeed computes on {chosen!r} in this process, not on {device!r}; "
            f"set DS_ACCELERATOR={device} before it is imported"
        )
    if device == "cuda":
        torch.cuda.set_device(0)
    library.init_distributed(
        _BACKENDS[device],
        auto_mpi_discovery=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        verbose=False,
    )


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ranks share the parameter."""
    return partition_of(parameter) is not None


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, gathered or not."""
    partition = partition_of(parameter)
    return parameter.shape if partition is None else partition.shape


def owned_slice(parameter: torch.nn.Parameter) -> WeightSlice:
    """The part of the flattened parameter that this rank keeps.

    The slices of all ranks tile the parameter in rank order. All have the same size except the last
    ones, whose padding is excluded here; a parameter that is not partitioned is one slice.
    """
    partition = partition_of(parameter)
    if partition is None:
        return WeightSlice(0, parameter.numel())
    rank, size, total = partition.rank, partition.values.numel(), partition.elements
    return WeightSlice(min(rank * size, total), min((rank + 1) * size, total))


class Squares(NamedTuple):
    """Sums of squares over the elements that a rank changed, in float64.

    Attributes:
        delta: Σ of the squared change.
        before: Σ of the squared original weight.
        lost: Σ of the squared part that rounding to the stored dtype removes.
        largest: the largest |W + Δ| among them, before rounding; NaN if any is NaN.
    """

    delta: float
    before: float
    lost: float
    largest: float


def add_block(
    engine: Any,
    parameter: nn.Parameter,
    block: torch.Tensor,
    top: int = 0,
    left: int = 0,
    *,
    stored: torch.dtype | None = None,
) -> Squares:
    """Add this rank's part of a block of a weight change to the weight, in place.

    ``W ← (float64(W) + Δ)``, rounded once to the weight's dtype. Needs no other rank, but the
    next forward sees a whole change only if every rank has written its part.

    Args:
        engine: the engine from `load_partitioned`; unused for a parameter that is not partitioned.
        parameter: the weight, a matrix, or stacked matrices, whose rows count on.
        block: part of the change, or all of it; any floating dtype and device.
        top: row of the weight at which the block starts.
        left: column of the weight at which the block starts.
        stored: dtype of the weight in the checkpoint, which may be narrower than here; None: the
            same.

    Raises:
        ValueError: the block is not inside the weight.
        WorkerError: the weight is gathered, so that the change would be lost.
    """
    shape = _as_matrix(full_shape(parameter))
    if block.ndim != 2 or top + len(block) > shape[0] or left + block.shape[1] > shape[1]:
        raise ValueError(
            f"a change of shape {tuple(block.shape)} at row {top}, column {left} is not inside the "
            f"weight of shape {tuple(full_shape(parameter))}"
        )
    kept = _writable_slice(engine, parameter)
    squares = torch.zeros(3, dtype=torch.float64, device=kept.device)
    largest = torch.zeros((), dtype=torch.float64, device=kept.device)
    start, stop = owned_slice(parameter)
    for part in _rectangles(start, stop, shape[1]):
        rows = range(max(top, part.top), min(top + len(block), part.bottom))
        columns = range(max(left, part.left), min(left + block.shape[1], part.right))
        if not rows or not columns:
            continue
        held = kept[part.offset : part.offset + part.size].view(-1, part.right - part.left)
        weight = held[_within(rows, part.top), _within(columns, part.left)]
        change = block.detach()[_within(rows, top), _within(columns, left)]
        step = max(1, _PIECE // len(columns))
        for weights, changes in zip(weight.split(step), change.split(step), strict=True):
            added = changes.to(kept.device, torch.float64)
            here, most = _add(weights, added, stored or weights.dtype)
            squares += here
            largest = torch.maximum(largest, most)
    delta, before, lost = squares.tolist()
    return Squares(delta, before, lost, largest.item())


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def own_squares(engine: Any, parameter: nn.Parameter) -> tuple[float, float]:
    """The sum of squares of the elements in `owned_slice`, and the largest of their sizes."""
    total, largest = 0.0, 0.0
    for part in own_values(engine, parameter).split(_PIECE):
        total += part.double().square().sum().item()
        largest = max(largest, part.abs().max().item()) if part.numel() else largest
    return total, largest


def own_values(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """The elements in `owned_slice`, flat; do not write to them.

    Raises:
        WorkerError: the weight is gathered.
    """
    start, stop = owned_slice(parameter)
    return _writable_slice(engine, parameter)[: stop - start]


def put_own_values(engine: Any, parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Write the elements in `owned_slice`, as `own_values` gave them.

    Raises:
        WorkerError: the weight is gathered.
    """
    with torch.no_grad():
        _writable_slice(engine, parameter)[: len(values)].copy_(values)


def _add(
    weight: torch.Tensor, change: torch.Tensor, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to a part of a weight; return the sums of `Squares`, and the largest |W + Δ|."""
    before = weight.double()
    after = before + change
    # In float64 nothing here is a copy, so nothing changes in place before all is known.
    lost = (after.to(stored).double() - before).sub_(change)
    sums = torch.stack([tensor.square().sum() for tensor in (change, before, lost)])
    with torch.no_grad():
        weight.copy_(after)
    return sums, after.abs_().max()


class _Rectangle(NamedTuple):
    """A rectangle of a matrix that is contiguous in a slice of it, from ``offset`` on."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int

    @property
    def size(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def _rectangles(start: int, stop: int, width: int) -> Iterator[_Rectangle]:
    """The rectangles that elements ``start`` to ``stop - 1`` of a matrix in row-major order form:
    the end of a row, whole rows, the beginning of a row."""
    place = start
    while place < stop:
        row, column = divmod(place, width)
        rows = (stop - place) // width if not column else 0
        right = width if rows else min(width, column + stop - place)
        part = _Rectangle(row, row + max(rows, 1), column, right, place - start)
        yield part
        place += part.size


def _within(numbers: range, origin: int) -> slice:
    return slice(numbers.start - origin, numbers.stop - origin)


@contextlib.contextmanager
def gathered(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Provide a copy of the whole parameter on every rank; all ranks must enter together.

    Writing to the copy changes nothing. Meant for tests and digests: it costs twice the weight.
    """
    if not is_partitioned(parameter):
        yield parameter.detach().clone()
        return
    with deepspeed().zero.GatheredParameters([parameter]):
        _held.add(id(parameter))
        try:
            yield parameter.detach().clone()
        finally:
            _held.discard(id(parameter))


def _writable_slice(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's flat storage of a parameter, safe to write to.

    Raises:
        WorkerError: the parameter is gathered.
    """
    partition = partition_of(parameter)
    if partition is None:
        return parameter.data.view(-1)
    if id(parameter) not in _held:
        # Weights may stay gathered after a forward: small ones, or if modules ran in another
        # order than before. A write to the slice of such a weight is lost. All weights are
        # released only if this one is gathered: the release runs Python's garbage collector.
        if partition.gathered:
            engine.empty_partition_cache()
            partition = partition_of(parameter)
        if partition is not None and not partition.gathered:
            return partition.values
    raise WorkerError(
        f"the weight of shape {tuple(full_shape(parameter))} is gathered, and a write to its slice "
        "now would be lost; write between forwards, outside of gathered(…)"
    )


def deepspeed() -> Any:
    """The library, imported late because it reads the environment on import."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        compile_nothing()
    return deepspeed


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
