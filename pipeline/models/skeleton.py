"""A model without weights: modules and buffers as in transformers, parameters on *meta*.

Ranks start from it and read only the weights they keep. Buffers (rotary frequencies, causal masks)
are small and complete on every rank; they must be those that ``from_pretrained`` makes, in its
dtype, or ranks would compute something other than the workers do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, StoredTensor
from pmet.model import transformers_internals

# Set explicitly: by default transformers asks at the terminal whether to run such code.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# The exceptions transformers raises for damaged or missing files of a model.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    TypeError,
    RecursionError,
    StrictDataclassError,
)


def open_skeleton(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Open a folder's model without its weights: names and shapes, for a few kilobytes.

    Args:
        folder: a model folder.
        dtype: dtype of the parameters; None uses the folder's configuration.

    Raises:
        ModelError: transformers cannot open it as a causal language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        with torch.device("meta"):
            options = NO_CODE | ({"dtype": dtype} if dtype else {})
            return model_class(config).from_config(config, **options)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {folder} is not a causal language model that transformers can open ({reason})"
        ) from None


def model_class(config: Any) -> Any:
    """The class of transformers that opens a model for text, without its parts being rewritten.

    A language model that is wrapped together with a vision model is opened with it, unless
    transformers reads it alone from the same files (Llama 4).
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if transformers_internals.is_causal_type(config.model_type):
        return AutoModelForCausalLM
    wrapped = transformers_internals.reads_images(config.model_type)
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def skeleton_with_buffers(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[nn.Module, dict[nn.Parameter, StoredTensor | None]]:
    """The model of a checkpoint in evaluation mode, its parameters without storage.

    Parameters that share values become one parameter, unless the checkpoint stores each of them.

    Args:
        checkpoint: a model folder.
        dtype: dtype of the parameters.

    Returns:
        The model; and for each parameter its location in the checkpoint, or None if the checkpoint
        stores it in another form, for example fused with others, which transformers converts at
        load time.

    Raises:
        ModelError: transformers cannot build the model.
    """
    with transformers_internals.unfilled():
        model = open_skeleton(checkpoint.folder, dtype)
    checkpoint = in_todays_names(checkpoint, model)
    stored = {name: checkpoint.stored(name, model.base_model_prefix) for name in model.state_dict()}
    _make_buffers(model, checkpoint, stored)
    model.tie_weights(missing_keys={name for name, tensor in stored.items() if tensor is None})
    return model.eval(), _places(model, stored)


def stored_weights(
    checkpoint: Checkpoint, model: Any, parameters: Sequence[str]
) -> list[StoredTensor]:
    """Where a checkpoint keeps parameters: in one tensor each, or in one for each of its experts.

    Args:
        checkpoint: a model folder.
        model: its skeleton.
        parameters: the parameters' names in the loaded model.

    Raises:
        ModelError: one is stored fused with others, or some of its experts are missing.
    """
    renamed, prefix = in_todays_names(checkpoint, model), getattr(model, "base_model_prefix", "")
    found = {name: renamed.stored(name, prefix) for name in parameters}
    if not all(found.values()):
        parts = _parts(checkpoint, model)
        for name in parameters:
            names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            stacked = next((parts[n] for n in names if n in parts), None)
            if found[name] is None and stacked:
                shape = tuple(model.get_parameter(name).shape)
                found[name] = _stack(checkpoint, name, shape, stacked)
    return [tensor or renamed.find(name, prefix) for name, tensor in found.items()]


def _parts(checkpoint: Checkpoint, model: Any) -> dict[str, dict[int, StoredTensor]]:
    """The tensors of single experts that are stacked at load time, by parameter and expert."""
    part_of = transformers_internals.stacking(model)
    parts: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if (part := part_of(name)) is not None:
            parts.setdefault(part[0], {})[part[1]] = tensor
    return parts


def _stack(
    checkpoint: Checkpoint,
    parameter: str,
    shape: tuple[int, ...],
    parts: Mapping[int, StoredTensor],
) -> StoredTensor:
    fitting = {i: parts[i] for i in range(shape[0]) if i in parts and parts[i].shape == shape[1:]}
    if len(fitting) < shape[0] or len(parts) > shape[0]:
        raise ModelError(
            f"model {checkpoint.folder} stores {len(fitting)} of the {shape[0]} experts of "
            f"{parameter} in the shape that its config.json asks for, and {len(parts)} in all; "
            "copy or download the model again, or correct config.json"
        )
    return replace(fitting[0], shape=shape, parts=tuple(fitting.values()))


def unread(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Names of stored tensors that ``model``, a skeleton of the checkpoint, does not read.

    Old releases stored masks, as 16-bit −∞. Tensors fused or split at load time count as read.
    """
    renamed = in_todays_names(checkpoint, model)
    found = (renamed.stored(name, model.base_model_prefix) for name in model.state_dict())
    read = {tensor.name for tensor in found if tensor is not None}
    return {tensor.name for tensor in renamed.tensors.values()} - read


def in_todays_names(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with its tensors renamed as for loading: names in old files have changed.

    Tensors that are converted at load time are left out.
    """
    names = loaded_names(checkpoint.tensors, model)
    named = {names[n]: stored for n, stored in checkpoint.tensors.items() if names[n] is not None}
    return replace(checkpoint, tensors=cast(dict[str, StoredTensor], named))


def loaded_names(stored: Iterable[str], model: nn.Module) -> dict[str, str | None]:
    """The names under which transformers loads stored tensors into ``model``.

    Args:
        stored: names in a checkpoint's files.
        model: the model, which may be a skeleton.

    Returns:
        For each stored name, the name it is loaded under, with the stored prefix; None for a
        tensor that is converted at load time, for example fused with others.
    """
    renamed = transformers_internals.renaming(model)
    return {name: renamed(name) for name in stored}


def _places(
    model: nn.Module, stored: Mapping[str, StoredTensor | None]
) -> dict[nn.Parameter, StoredTensor | None]:
    found: dict[nn.Parameter, StoredTensor | None] = {}
    # Shared parameters have several names, and the checkpoint may use any of them.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = stored.get(name)
        fits = tensor is not None and tensor.shape == tuple(parameter.shape)
        found[parameter] = found.get(parameter) or (tensor if fits else None)
    return found


def _make_buffers(
    model: Any, checkpoint: Checkpoint, stored: Mapping[str, StoredTensor | None]
) -> None:
    """Fill the buffers with their stored values, or else as the model initialises them."""
    for name, buffer in list(model.named_buffers()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, torch.empty_like(buffer, device="cpu"))
    # This initialises parameters, too, but they have no storage to fill.
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if tensor := stored.get(name):
            buffer.copy_(checkpoint.read(tensor))
