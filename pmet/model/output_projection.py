"""The attention output projection, if the hyper-parameters name the block around it.

PMET's files name the projection itself as ``attn_module_tmp``; those of MEMIT, ROME and their ports
name the whole attention (``transformer.h.{}.attn``, ``model.layers.{}.self_attn``). Such a block
returns its projection's output, so δ_a has the same place in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pmet.errors import ArchitectureError


def named_projection(
    named: nn.Module, template: str, *, known: str | None, usual: Collection[str], width: int
) -> str:
    """The template of the output projection that ``attn_module_tmp`` names or contains.

    Args:
        named: the module that it names, in one layer.
        template: its value.
        known: template of the projection in the model's family; None if the family is unknown.
        usual: usual last parts of the names of output projections.
        width: V, the model's width.

    Raises:
        ArchitectureError: the module is a matrix of another width than the model's, contains no
            output projection, or may return something other than that projection's output.
    """
    said = f"attn_module_tmp: {template} is a {type(named).__name__}"
    own = _output_width(named)
    if own == width:
        return template
    if own is not None:
        said = f"{said} of width {own}, but the model's width is {width}"
    elif known is None and (inside := _returned(named, usual, width)):
        return f"{template}.{inside}"
    elif known is None:
        said = f"{said} that may return something other than the output of one of its projections"
    elif known.startswith(f"{template}."):
        return known
    else:
        said = f"{said} without an output projection"
    raise ArchitectureError(f"{said}; {_remedy(template, known)}")


def _returned(block: nn.Module, usual: Collection[str], width: int) -> str | None:
    """The projection whose output the block returns; None if uncertain."""
    found = list(_candidates(block, width))
    if len(found) > 1:
        found = [name for name in found if name.rpartition(".")[2] in usual]
    if len(found) != 1 or _normed_after(block, found[0], width):
        return None
    return found[0]


def _remedy(template: str, known: str | None) -> str:
    if known is not None:
        return f"name the attention output projection, {known}, or remove the key"
    return f"name the attention output projection itself, for example {template}.o_proj"


def _candidates(block: nn.Module, width: int) -> Iterator[str]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and _output_width(module) == width:
            yield name


def _normed_after(block: nn.Module, projection: str, width: int) -> bool:
    """Whether a norm of the model's width follows the projection, and so changes its output."""
    names = [name for name, _ in block.named_modules()]
    after = names[names.index(projection) + 1 :]
    return any(_shape(block.get_submodule(name)) == (width,) for name in after)


def _output_width(module: nn.Module) -> int | None:
    """Width of a matrix's output; None for a module without a matrix of its own."""
    shape = _shape(module)
    if len(shape) != 2:
        return None
    return shape[1] if isinstance(module, Conv1D) else shape[0]


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
