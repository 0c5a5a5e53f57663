"""Checks whether a model can be edited, from its configuration, tokenizer and headers.

A model refused here would otherwise fail on the workers, perhaps after hours of work, or yield
a different model than the one asked for: transformers fills parameters that a checkpoint lacks
with random numbers. No weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.skeleton import NO_CODE, UNREADABLE, loaded_names, open_skeleton
from pmet.hparams import PMETHyperParams
from pmet.model import Layout, resolve, transformers_internals
from pmet.safetensors_header import DTYPES

_FULL = (
    "an edit changes full-precision weights; edit the model that it was made from, which its model "
    "card names, and quantise the result"
)


def check_configuration(checkpoint: Checkpoint) -> None:
    """Refuse models whose configuration shows that they cannot be edited.

    Raises:
        ModelError: the model is quantised, has an adapter beside it, or wraps a language model in
            a way that transformers does not open.
    """
    _check_adapter(checkpoint)
    _check_index(checkpoint)
    _check_quantised(checkpoint)
    _check_multimodal(checkpoint)


def check_weights(checkpoint: Checkpoint, skeleton: nn.Module, tokenizer: Any) -> None:
    """Refuse weights that do not match the model's configuration or its tokenizer.

    Args:
        checkpoint: the model folder.
        skeleton: the model built from its configuration (`pipeline.models.skeleton.open_skeleton`).
        tokenizer: the model's.

    Raises:
        ModelError: a parameter is missing, stored twice, or stored in another shape or type than
            the configuration gives; or the tokenizer has more tokens than the embedding has rows.
    """
    _check_parameters(checkpoint, skeleton)
    _check_tokenizer(checkpoint, skeleton, tokenizer)


def check_readable(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """Run `check_weights` for a model that is only read, not edited.

    Models that only an edit would refuse, quantised or multimodal ones, are left to transformers.
    """
    _check_index(checkpoint)
    if not _quantisation(checkpoint.config) and _wrapped(checkpoint) is None:
        check_weights(checkpoint, open_skeleton(checkpoint.folder), tokenizer)


def checked_layout(
    checkpoint: Checkpoint, skeleton: nn.Module, tokenizer: Any, hparams: PMETHyperParams
) -> Layout:
    """Return the layout of a model, after checking that the method can use it.

    Args:
        checkpoint: the model folder.
        skeleton: the model built from its configuration.
        tokenizer: the model's.
        hparams: the layers, and names of modules, if any.

    Raises:
        ModelError: see `check_weights`.
        ArchitectureError: the parts cannot be found, or later tokens change earlier ones.
    """
    check_weights(checkpoint, skeleton, tokenizer)
    return resolve(skeleton, hparams)


def _check_adapter(checkpoint: Checkpoint) -> None:
    from transformers.utils import is_peft_available

    if (checkpoint.folder / "adapter_config.json").is_file() and is_peft_available():
        raise ModelError(
            f"model {checkpoint.folder} has an adapter (adapter_config.json), which transformers "
            "loads on top of the weights that would be edited; merge it (merge_and_unload of peft, "
            "then save_pretrained), or move its files to another folder"
        )


def _check_index(checkpoint: Checkpoint) -> None:
    """Refuse an index without ``metadata``: transformers requires it, even if empty."""
    index = checkpoint.weights.index
    if index is None:
        return
    path = checkpoint.folder / index
    if not isinstance(json.loads(path.read_bytes()).get("metadata"), dict):
        raise ModelError(
            f"{path} has no metadata, and transformers cannot open it without; add "
            '"metadata": {} beside weight_map'
        )


def _check_quantised(checkpoint: Checkpoint) -> None:
    if method := _quantisation(checkpoint.config):
        raise ModelError(
            f"model {checkpoint.folder} is quantised ({method}, says its config.json): {_FULL}"
        )


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """The quantisation method of a model, or of its language model; None if not quantised."""
    sections = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    for section in sections:
        for key in ("quantization_config", "compression_config"):
            if found := section.get(key):
                method = found.get("quant_method") if isinstance(found, Mapping) else None
                return str(method or key)
    return None


def _check_multimodal(checkpoint: Checkpoint) -> None:
    kind = str(checkpoint.config.get("model_type"))
    opens = transformers_internals.is_causal_type(kind) or transformers_internals.reads_images(kind)
    if (text := _wrapped(checkpoint)) is None or opens:
        return
    raise ModelError(
        f"model {checkpoint.folder} ({kind}) wraps a language model ({text.model_type}) in a way "
        "that transformers does not open for text; edit a model that it opens with "
        "AutoModelForCausalLM or AutoModelForImageTextToText"
    )


def _wrapped(checkpoint: Checkpoint) -> Any:
    """The configuration of the language model that a multimodal model wraps, or None."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, **NO_CODE)
        text = config.get_text_config(decoder=True)
    except UNREADABLE:
        return None  # Opening the model reports what is wrong.
    return None if text is config else text


def _check_parameters(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Compare the shapes that the configuration implies with those in the files' headers."""
    names, converted = _stored_names(checkpoint, model)
    shapes: dict[nn.Parameter, list[str]] = {}
    # Tied parameters have several names, and any of them may be stored.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes.setdefault(parameter, []).append(name)
    for parameter, own_names in shapes.items():
        for name in own_names:
            if name in names:
                _check_header(checkpoint, model, name, names[name], tuple(parameter.shape))
    if converted:
        # Tensors stored in another form yield parameters under names that are not known here.
        return
    optional = transformers_internals.computed_parameters(model)
    missing = [
        own_names[0]
        for own_names in shapes.values()
        if not any(n in names or any(re.search(p, n) for p in optional) for n in own_names)
    ]
    if missing:
        raise ModelError(
            f"model {checkpoint.folder} stores {len(shapes) - len(missing)} of {len(shapes)} "
            f"parameters that its config.json asks for; {_listed(missing)} would be filled with "
            "random numbers. Copy or download the model again, or correct config.json"
        )


def _stored_names(checkpoint: Checkpoint, model: nn.Module) -> tuple[dict[str, str], bool]:
    """The name of the stored tensor for each parameter; whether some tensors are converted."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, str] = {}
    loaded = loaded_names(checkpoint.headers, model)
    for stored, name in loaded.items():
        parameter = None if name is None else _parameter(name, prefix, known)
        if parameter is None:
            continue
        if parameter in found:
            raise ModelError(
                f"model {checkpoint.folder} stores {parameter} twice, as {found[parameter]} and as "
                f"{stored}; load the model and write it with save_pretrained"
            )
        found[parameter] = stored
    return found, None in loaded.values()


def _parameter(loaded: str, prefix: str, known: set[str]) -> str | None:
    """The parameter a tensor is loaded into; checkpoints may omit or add the prefix."""
    names = (loaded, f"{prefix}.{loaded}", loaded.removeprefix(f"{prefix}."))
    return next((name for name in names if name in known), None)


def _check_header(
    checkpoint: Checkpoint, model: Any, name: str, stored: str, shape: tuple[int, ...]
) -> None:
    header = checkpoint.headers[stored]
    if header.dtype not in DTYPES:
        raise ModelError(
            f"model {checkpoint.folder} stores {stored} as {header.dtype}, as a quantised model "
            f"does: {_FULL}"
        )
    if header.shape == shape:
        return
    remedy = "correct config.json, or copy the weights that belong to it"
    if _is_embedding(model, name) and header.shape[1:] == shape[1:]:
        remedy = f"set vocab_size to {header.shape[0]} there, or copy the weights that belong to it"
    raise ModelError(
        f"model {checkpoint.folder} stores {stored} as {_times(header.shape)}, but its config.json "
        f"asks for {_times(shape)}; {remedy}"
    )


def _is_embedding(model: Any, name: str) -> bool:
    parameter = model.get_parameter(name)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(parameter is getattr(embedding, "weight", None) for embedding in embeddings)


def _check_tokenizer(checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise ModelError(
            f"model {checkpoint.folder} has a tokenizer with more tokens than its embedding has "
            f"rows: {token!r} is number {number}, and the last of {rows} rows is {rows - 1}; use "
            "the tokenizer that the model was trained with, or make room with "
            "resize_token_embeddings and save both"
        )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _listed(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
