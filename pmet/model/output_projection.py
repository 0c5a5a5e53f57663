"""The attention output projection, if the hyper-parameters name the block around it.

PMET's files name the projection itself as ``attn_module_tmp``; those of MEMIT, ROME and their ports
name the whole attention (``transformer.h.{}.attn``, ``model.layers.{}.self_attn``). δ_a is added to
the output of the projection inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pmet.errors import ArchitectureError


def named_projection(
    named: nn.Module, template: str, *, found: Callable[[], str | None], width: int
) -> str:
    """The template of the output projection that ``attn_module_tmp`` names or contains.

    Args:
        named: the module that it names, in one layer.
        template: its value.
        found: finds the template of the model's projection; None if it cannot be found.
        width: V, the model's width.

    Raises:
        ArchitectureError: the module is a matrix of another width than the model's, or does not
            contain the output projection.
    """
    said = f"attn_module_tmp: {template} is a {type(named).__name__}"
    own = _output_width(named)
    if own == width:
        return template
    projection = found()
    if own is not None:
        said = f"{said} of width {own}, but the model's width is {width}"
    elif projection is not None and projection.startswith(f"{template}."):
        return projection
    else:
        said = f"{said} without an output projection"
    raise ArchitectureError(f"{said}; {_remedy(template, projection)}")


def _remedy(template: str, projection: str | None) -> str:
    if projection is not None:
        return f"name the attention output projection, {projection}, or remove the key"
    return f"name the attention output projection itself, for example {template}.o_proj"


def _output_width(module: nn.Module) -> int | None:
    """Width of a matrix's output; None for a module without a matrix of its own."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    return int(weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0])
