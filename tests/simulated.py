"""Simulated devices, for tests of code that runs on several.

    with devices(2) as (first, second):
        model.to(first)          # computes on the CPU, and refuses tensors on ``second``

A tensor on one of them is a wrapper around a CPU tensor that knows its device. Operations on
tensors of different devices are refused, as with two GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# A device type that torch has but no code checks for; autograd treats it like the CPU.
_KIND = "lazy"
_CPU = torch.device("cpu")
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class _Elsewhere(torch.Tensor):
    """A tensor on a simulated device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> _Elsewhere:
        wrapper: _Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        wrapper.inner = inner
        return wrapper

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    where = _place(operation, args, kwargs)
    inner_args, inner_kwargs = tree_map(
        lambda x: x.inner if isinstance(x, _Elsewhere) else x, (args, dict(kwargs))
    )
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = _CPU
    result = operation(*inner_args, **inner_kwargs)
    changed = [
        a.name for a in operation._schema.arguments if a.alias_info and a.alias_info.is_write
    ]
    if changed and isinstance(result, torch.Tensor):
        names = [argument.name for argument in operation._schema.arguments]
        return kwargs[changed[0]] if changed[0] in kwargs else args[names.index(changed[0])]
    if where == _CPU:
        return result
    return tree_map(lambda x: _Elsewhere(x, where) if isinstance(x, torch.Tensor) else x, result)


def _place(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of an operation.

    Raises:
        RuntimeError: its tensors are on several devices.
    """
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if operation.overloadpacket in _COPIES:
        device: torch.device = args[0].device
        return device
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    # A scalar CPU tensor may be combined with any device.
    found = {x.device for x in tensors if x.dim() or x.device != _CPU}
    if len(found) > 1:
        raise RuntimeError(f"{operation}: tensors are on {sorted(map(str, found))}")
    return found.pop() if found else _CPU


def _index_on(device: torch.device, index: Any) -> Any:
    """Convert the lists in an index to tensors on a device, which torch would do internally."""
    if isinstance(index, tuple):
        return tuple(_index_on(device, part) for part in index)
    return torch.tensor(index).to(device) if isinstance(index, list) else index


class _Operations(TorchDispatchMode):
    """Makes tensors on simulated devices."""

    def __torch_dispatch__(
        self, operation: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Patches functions that read tensors without consulting any mode."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if function is torch.tensor:
            device = given.pop("device", None) or _CPU
            return function(*args, **given).to(device)
        if function is torch.Tensor.new_tensor:
            like, values = args
            return torch.tensor(values, dtype=like.dtype).to(like.device)
        if function in (torch.Tensor.tolist, torch.Tensor.numpy):
            return function(args[0].detach().cpu())
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            tensor, index, *value = args
            return function(tensor, _index_on(tensor.device, index), *value)
        return function(*args, **given)


@contextmanager
def devices(count: int) -> Iterator[list[torch.device]]:
    """Provide this many devices in addition to the CPU."""
    with _Functions(), _Operations():
        yield [torch.device(_KIND, number) for number in range(count)]
