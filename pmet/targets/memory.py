"""How many requests fit into memory side by side.

The memory for a request is measured, not guessed: the first request is evaluated alone while the
tensors saved for its backward pass are added up. The rest follows from the lengths of the others.

Shape letters: R rows (prompts of a request), P prefix columns, S suffix columns, M places where the
loss reads, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmet.model import Layout, layers_on
from pmet.targets.problem import Problem

_FLOAT = 4
# Log-probabilities, their gradient, the logits and theirs.
_LOGITS = 4 * _FLOAT
# Keys and values exist three times while a batch is reassembled.
_COPIES = 3
# Scores, shares and a mask, all of which some families keep.
SCORE_BYTES = 3 * _FLOAT
# Uncounted memory: fragmentation, workspaces of matrix products, gradients in flight.
_MARGIN = 1.25


@dataclass(frozen=True)
class Footprint:
    """The memory of the parts of a batch, in bytes.

    Attributes:
        column: keys and values of one token in the layers above z.
        column_below: the same in the other layers; stored while prefixes are computed.
        token: activations saved for one suffix token.
        scores: attention scores, all heads and layers above z, for one pair of tokens.
        vocabulary: V.
        depth: layers above z, at least one.
    """

    column: int
    column_below: int
    token: int
    scores: int
    vocabulary: int
    depth: int

    def of(self, problems: Sequence[Problem], new: Sequence[Problem]) -> int:
        """Peak bytes of a batch of ``problems``, of which ``new`` are just being added."""
        suffix, prefix = (max(sizes) for sizes in zip(*(p.shape for p in problems), strict=True))
        rows = sum(len(p.prompts) for p in problems)
        places = sum(p.read_tokens + 1 for p in problems)
        new_rows = sum(len(p.prompts) for p in new)
        columns = prefix + suffix
        held = rows * columns * self.column
        step = rows * suffix * (self.token + columns * self.scores)
        step += (places * _LOGITS + len(problems) * _FLOAT) * self.vocabulary
        # Without gradients, only one layer's activations exist at a time.
        fill = new_rows * columns * (2 * (self.column + self.column_below))
        fill += new_rows * columns * (2 * self.token + prefix * self.scores) // self.depth
        return int(_MARGIN * max(held + step, _COPIES * held + fill))


class Count:
    """Adds up the tensors that autograd saves for the backward pass, counting each storage once."""

    def __init__(self, but: Iterable[torch.Tensor]) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in but}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within: saved tensors are counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Numbers of query heads and key heads, and the width of a head, from the configuration."""
    config = config.get_text_config()
    heads = int(config.num_attention_heads)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(key_heads), int(width)


def room_beside(model: nn.Module, layout: Layout, layer: int) -> int:
    """Bytes available beside a model for optimising targets at ``layer``.

    On several devices, each device takes its share of the memory for the layers above.
    """
    parts = layers_on(model, layout, above=layer)
    return int(min(free_memory(device) / part for device, part in parts.items()))


def free_memory(device: torch.device) -> int:
    """Bytes that a computation on ``device`` may use: nine tenths of the free memory of a GPU, half
    of this process's share of the free memory of a host.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) * 9 // 10
    import psutil  # type: ignore[import-untyped]

    free = min(psutil.virtual_memory().available, _cgroup_room())
    # As many processes as there are cores may run side by side.
    share = min(1.0, torch.get_num_threads() / (os.cpu_count() or 1))
    return int(free * share / 2)


def _cgroup_room(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left under a container's limit; without one, more than any machine has."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return max(0, int(limit) - used) if limit != "max" else 1 << 62
    except (OSError, ValueError):
        return 1 << 62


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
