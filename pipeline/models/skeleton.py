"""A model without its weights: modules and buffers as from transformers, parameters on *meta*.

Ranks start from it and read only what they keep. Buffers (rotary frequencies, causal masks) are
small and whole everywhere; they must be those that ``from_pretrained`` makes, in whatever dtype it
makes them, or ranks would not compute what the workers compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, StoredTensor
from pmet.model import transformers_internals

# Said aloud: where nothing is said, transformers asks at the terminal whether to run such code.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# What transformers raises where a file of a model is not what it should be.
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
    """The model of a folder without its weights: names and shapes, for a few kilobytes.

    Args:
        folder: a model folder.
        dtype: of the parameters; as the folder's configuration says if None.

    Raises:
        ModelError: transformers cannot open it as a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        with torch.device("meta"):
            options = NO_CODE | ({"dtype": dtype} if dtype else {})
            return AutoModelForCausalLM.from_config(config, **options)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {folder} is no causal language model that transformers can open ({reason})"
        ) from None


def skeleton_with_buffers(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[nn.Module, dict[nn.Parameter, StoredTensor | None]]:
    """The model of a checkpoint in evaluation mode, its parameters without storage.

    Parameters that share values are one parameter, as far as the checkpoint leaves one of them out.

    Args:
        checkpoint: a model folder.
        dtype: of the parameters.

    Returns:
        The model; and for each parameter where the checkpoint stores it. None where it does so in
        another form than the model has it, fused with others say, which transformers converts
        while loading.

    Raises:
        ModelError: transformers cannot make the model.
    """
    with transformers_internals.unfilled():
        model = open_skeleton(checkpoint.folder, dtype)
    checkpoint = _in_todays_names(checkpoint, model)
    stored = {name: checkpoint.stored(name, model.base_model_prefix) for name in model.state_dict()}
    _make_buffers(model, checkpoint, stored)
    model.tie_weights(missing_keys={name for name, tensor in stored.items() if tensor is None})
    return model.eval(), _places(model, stored)


def unread(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Names of stored tensors that ``model``, a skeleton of the checkpoint, does not read.

    Old releases stored masks, in 16 bits of −∞; what is fused or split while loading is read.
    """
    renamed = _in_todays_names(checkpoint, model)
    found = (renamed.stored(name, model.base_model_prefix) for name in model.state_dict())
    read = {tensor.name for tensor in found if tensor is not None}
    return {tensor.name for tensor in renamed.tensors.values()} - read


def _in_todays_names(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with its tensors named as they are loaded: names of old files have changed.

    Tensors that are not loaded as they are stored are left out.
    """
    names = loaded_names(checkpoint.tensors, model)
    named = {names[n]: stored for n, stored in checkpoint.tensors.items() if names[n] is not None}
    return replace(checkpoint, tensors=cast(dict[str, StoredTensor], named))


def loaded_names(stored: Iterable[str], model: nn.Module) -> dict[str, str | None]:
    """What transformers calls stored tensors when it loads them into ``model``.

    Args:
        stored: names in a checkpoint's files.
        model: the model, which may be a skeleton.

    Returns:
        By stored name the one that it is loaded under, its prefix as it was stored; None where it
        is converted on the way, fused with others say.
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
    """Give the buffers their values: those stored, else what the model fills them with."""
    for name, buffer in list(model.named_buffers()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, torch.empty_like(buffer, device="cpu"))
    # Fills parameters, too; they have no storage to be filled.
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if tensor := stored.get(name):
            buffer.copy_(checkpoint.read(tensor))
