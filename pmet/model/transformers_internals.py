"""Every name that this project uses of transformers beyond its documented interface.

``NAMES`` says what each is for and why no public name serves. The tests of this module look for
each of them in the transformers that is installed, so that an upgrade that removes one is noticed
there. transformers is imported where it is needed: some callers never need it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn

_TANH = "to replace the tanh form of GELU, which some of them compute in eight operations; models \
take it from a table of activations that names these classes alone"
_RENAMED = "to know under which names stored tensors are loaded without loading them; only \
from_pretrained tells, and it loads all"
_GGUF = "to refuse an architecture before a GGUF file is read, and name those that can be"
NAMES = {
    "transformers.PreTrainedModel._supports_attention_backend": (
        "to replace the attention only where a model takes another; set_attn_implementation "
        "merely warns where it does not"
    ),
    "transformers.PretrainedConfig._attn_implementation": (
        "to replace the stock attention only, and put it back; it can be set publicly, not read"
    ),
    "transformers.PreTrainedModel._keys_to_ignore_on_load_missing": (
        "to accept checkpoints without parameters that the model computes; from_pretrained reads "
        "the list, and no public name has it"
    ),
    "transformers.activations.NewGELUActivation": _TANH,
    "transformers.activations.GELUTanh": _TANH,
    "transformers.activations.FastGELUActivation": _TANH,
    "transformers.GPTJModel.embed_positions": (
        "to shorten the table of positions that GPT-J copies for every row; no setting does"
    ),
    "transformers.initialization.no_init_weights": (
        "to make a model without filling its parameters; from_config always fills them"
    ),
    "transformers.conversion_mapping.get_model_conversion_mapping": _RENAMED,
    "transformers.core_model_loading.WeightRenaming": _RENAMED,
    "transformers.core_model_loading.rename_source_key": _RENAMED,
    "transformers.core_model_loading.WeightConverter": _RENAMED,
    "transformers.core_model_loading.MergeModulelist": (
        "to overwrite an expert's own tensor where experts are stacked when they are loaded; only "
        "from_pretrained and save_pretrained know, and both take the whole model"
    ),
    "transformers.modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES": _GGUF,
    "transformers.integrations.gguf.gguf_config_mapping.GGUF_CONFIG_ARCHS": _GGUF,
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": (
        "to know which models open together with their vision model, without importing them all"
    ),
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (
        "to know which model types open as causal language models without importing them all"
    ),
}

_TANH_GELU = frozenset({"NewGELUActivation", "GELUTanh", "FastGELUActivation"})


def tanh_gelus(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that compute GELU's tanh form."""
    return [module for module in model.modules() if type(module).__name__ in _TANH_GELU]


def position_tables(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Modules that copy a table of all positions for every row, its name in them, and the table."""
    name = "embed_positions"
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get(name)
        if table is not None:
            yield module, name, table


def replaceable_attention(model: nn.Module) -> str | None:
    """The attention that a model computes with; None where it takes no other."""
    if not getattr(model, "_supports_attention_backend", False):
        return None
    return attention_code(getattr(model, "config", None))


def attention_code(config: Any) -> str | None:
    """The name of the attention code that a configuration chooses."""
    return getattr(config, "_attn_implementation", None)


def computed_parameters(model: nn.Module) -> Collection[str]:
    """Patterns of parameters that a checkpoint may lack, because the model computes them."""
    return getattr(model, "_keys_to_ignore_on_load_missing", None) or ()


def unfilled() -> AbstractContextManager[None]:
    """Within: models are made without filling their parameters."""
    from transformers.initialization import no_init_weights

    return cast(AbstractContextManager[None], no_init_weights())


def renaming(model: nn.Module) -> Callable[[str], str | None]:
    """By the name of a stored tensor, the name that it is loaded into ``model`` under.

    None where a tensor is converted on the way, fused with others say.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # releases of transformers that rename nothing
        return lambda name: name
    changes = get_model_conversion_mapping(cast(Any, model))
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    conversions = [change for change in changes if not isinstance(change, WeightRenaming)]

    def renamed(name: str) -> str | None:
        loaded_as, converted_by = rename_source_key(name, renamings, conversions)
        return loaded_as if converted_by is None else None

    return renamed


def stacking(model: nn.Module) -> Callable[[str], tuple[str, int] | None]:
    """By the name of a stored tensor, the parameter it is one expert's part of, and the expert.

    None where a tensor is loaded in another way.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            MergeModulelist,
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # releases of transformers that stack nothing
        return lambda name: None
    changes = get_model_conversion_mapping(cast(Any, model))
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    # Nothing but stacked: one tensor per expert, which becomes its slice along the first dimension.
    alone = {
        change.source_patterns[0]
        for change in converters
        if len(change.source_patterns) == 1
        and [(type(op), getattr(op, "dim", None)) for op in change.operations]
        == [(MergeModulelist, 0)]
    }

    def part(name: str) -> tuple[str, int] | None:
        loaded_as, pattern = rename_source_key(name, renamings, cast(Any, converters))
        if pattern not in alone or pattern is None or "*" not in pattern:
            return None
        today, _ = rename_source_key(name, renamings, [])
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), today)
        return (loaded_as, int(number[1])) if number else None

    return part


def is_causal_type(model_type: str) -> bool:
    """Whether transformers opens models of a type as causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def reads_images(model_type: str) -> bool:
    """Whether transformers opens models of a type as language models that read images, too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def gguf_architectures() -> set[str]:
    """The architectures that transformers reads from GGUF files, as it spells them."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # The list also names two sections of metadata.
    names = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    try:
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    except ImportError:  # releases of transformers with one list
        return names
    return names | set(GGUF_CONFIG_ARCHS)


def text_types() -> set[str]:
    """The model types that transformers opens for text, with or without images."""
    from transformers.models.auto import modeling_auto

    return {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
