"""Counts the floating-point operations of targets: the arithmetic limit of the optimisation.

The count follows from the lengths of the requests and the evaluations that each took, without
padding and with every exact shortcut (docs/method.md). Products of activations with weights and
with each other count, with two operations per multiply-add; norms, activation functions and the
optimiser do not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet import PMETHyperParams
from pmet.model import ContextTemplates, is_matrix, part_with, parts_beside, resolve
from pmet.request import EditRequest
from pmet.targets import Problem, attention_shape


@dataclass(frozen=True)
class Layer:
    """The weights of one layer that each token is multiplied with."""

    before: int
    projection: int
    ffn: int

    @property
    def all(self) -> int:
        """Total number of weights."""
        return self.before + self.projection + self.ffn


def needed(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    templates: ContextTemplates,
    evaluations: Sequence[int],
) -> float:
    """Return the minimum number of operations for the targets of ``requests``.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        requests: E edit requests.
        hparams: the method's hyper-parameters.
        templates: the context templates.
        evaluations: number of evaluations that each request's optimisation took.
    """
    layout = resolve(model, hparams)
    z, depth = hparams.target_layer, layout.depth
    layers = [_layer(model, layout, i) for i in range(depth)]
    head = _size([layout.head(model)])
    heads, _, width = attention_shape(model.config)
    pair = 2 * heads * width
    flat = [template for group in templates for template in group]
    problems = [Problem.of(tokenizer, request, flat) for request in requests]
    shared = _shared(problems)
    total = 0.0
    for problem, count in zip(problems, evaluations, strict=True):
        once = each = 0
        for prompt, number in problem.rows:
            own, suffix = len(prompt.prefix) - shared[number], len(prompt.suffix)
            pairs = sum(len(prompt.prefix) + i + 1 for i in range(suffix))
            # The request's own part of the prefix computes keys and values in every layer; the
            # suffix passes through the layers up to z.
            once += own * (sum(layer.all for layer in layers[:-1]) + layers[-1].before)
            once += pair * depth * sum(shared[number] + i + 1 for i in range(own))
            once += suffix * sum(layer.all for layer in layers[: z + 1]) + pair * (z + 1) * pairs
            read = len(problem.answers[number]) if number < len(problem.contexts) else 0
            read += problem.kl_row == number
            each += layers[z].ffn + read * head
            each += suffix * sum(layer.all for layer in layers[z + 1 : -1])
            each += pair * (depth - 1 - z) * pairs
            if z < depth - 1:
                last = layers[-1]
                each += suffix * last.before + read * (last.projection + last.ffn)
        # A step's backward pass costs as much as its evaluation; the last evaluation takes no step.
        total += 2.0 * (once + each * (2 * count - 1))
    return total


def _layer(model: nn.Module, layout: Any, index: int) -> Layer:
    layer, projection = layout.layer(model, index), layout.attention_projection(model, index)
    attention = part_with(layer, projection)
    before = [m for m in attention.modules() if is_matrix(m) and m is not projection]
    ffn = [m for child in parts_beside(layer, attention) for m in child.modules() if is_matrix(m)]
    return Layer(_size(before), _size([projection]), _size(ffn))


def _size(modules: Sequence[nn.Module]) -> int:
    return sum(
        parameter.numel() for m in modules for parameter in m.parameters() if parameter.ndim > 1
    )


def _shared(problems: Sequence[Problem]) -> dict[int, int]:
    """Return, for each context, the number of tokens that all requests' prefixes share."""
    prefixes: dict[int, list[tuple[int, ...]]] = {}
    for problem in problems:
        for prompt, number in problem.rows:
            prefixes.setdefault(number, []).append(prompt.prefix)
    lengths = {}
    for number, group in prefixes.items():
        same = 0
        while all(len(p) > same for p in group) and len({p[same] for p in group}) == 1:
            same += 1
        lengths[number] = same
    return lengths


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 1.0) -> float:
    """Return the operations per second of a large matrix product, the best of several tries."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    repeats = 1 if device.type == "cpu" else 10
    while best == 0 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right
        synchronize(device)
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for all launched kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
