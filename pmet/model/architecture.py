"""The names of the parts that the method needs, for each model family.

A new family is one line in ``FAMILIES``. The hyper-parameters decide which weights are edited and
where δ_a is added, and the table only supplies what they omit; so a model that is not in the table
can be edited by naming its modules in the hyper-parameter file. If they name the attention block,
as files of MEMIT do, δ_a is added to the projection inside it
(``pmet.model.output_projection``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pmet.errors import ArchitectureError
from pmet.hparams import PMETHyperParams
from pmet.model.output_projection import named_projection


@dataclass(frozen=True)
class Family:
    """Module names of one family; ``{}`` stands for the layer's number."""

    layer: str
    attention_projection: str
    down_projection: str
    final_norm: str
    head: str = "lm_head"


def _family(layer: str, attention: str, down: str, norm: str, head: str = "lm_head") -> Family:
    return Family(layer, f"{layer}.{attention}", f"{layer}.{down}", norm, head)


_LLAMA = _family("model.layers.{}", "self_attn.o_proj", "mlp.down_proj", "model.norm")

FAMILIES: dict[str, Family] = {
    "gpt2": _family("transformer.h.{}", "attn.c_proj", "mlp.c_proj", "transformer.ln_f"),
    "gptj": _family("transformer.h.{}", "attn.out_proj", "mlp.fc_out", "transformer.ln_f"),
    "gpt_neo": _family(
        "transformer.h.{}", "attn.attention.out_proj", "mlp.c_proj", "transformer.ln_f"
    ),
    "gpt_neox": _family(
        "gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"
    ),
    "opt": _family(
        "model.decoder.layers.{}", "self_attn.out_proj", "fc2", "model.decoder.final_layer_norm"
    ),
    "falcon": _family(
        "transformer.h.{}", "self_attention.dense", "mlp.dense_4h_to_h", "transformer.ln_f"
    ),
    "phi": _family("model.layers.{}", "self_attn.dense", "mlp.fc2", "model.final_layernorm"),
    "phi3": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _family("model.layers.{}", "self_attn.o_proj", "mlp.c_proj", "model.norm"),
}


@dataclass(frozen=True)
class Layout:
    """The parts of one model, located and checked.

    Attributes:
        family: names after applying the hyper-parameters; always of projections, never of blocks.
        depth: number of layers.
        value_width: V, the model's width.
        key_width: K, the FFN's inner width.
        transposed: the down-projection's weight is stored K×V (GPT-2's ``Conv1D``), not V×K.
    """

    family: Family
    depth: int
    value_width: int
    key_width: int
    transposed: bool

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """The layer (block) itself."""
        return _module(model, self.family.layer.format(index))

    def down_projection(self, model: nn.Module, index: int) -> nn.Module:
        """The FFN down-projection of a layer: its input is the key, its output the value."""
        return _module(model, self.family.down_projection.format(index))

    def attention_projection(self, model: nn.Module, index: int) -> nn.Module:
        """The attention output projection of a layer."""
        return _module(model, self.family.attention_projection.format(index))

    def head(self, model: nn.Module) -> nn.Module:
        """The output embedding, from hidden states to logits."""
        return _module(model, self.family.head)

    def weight_name(self, index: int) -> str:
        """Parameter name of a layer's edited weight."""
        return f"{self.family.down_projection.format(index)}.weight"

    def weight(self, model: nn.Module, index: int) -> nn.Parameter:
        """A layer's edited weight."""
        weight = self.down_projection(model, index).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def orient(self, delta_VK: torch.Tensor) -> torch.Tensor:
        """``delta_VK`` in the parameter's orientation: V×K, or K×V if it is transposed."""
        return delta_VK.T.contiguous() if self.transposed else delta_VK


def resolve(model: nn.Module, hparams: PMETHyperParams) -> Layout:
    """Find the parts of ``model``.

    Args:
        model: a causal language model whose parameters have their whole shapes; on *meta*, too.
        hparams: the layers, and names of modules for an unknown family.

    Raises:
        ArchitectureError: the family is unknown and the hyper-parameters do not name the parts, a
            named part does not exist, or a layer number is beyond the model's depth.
    """
    family = _named(model, hparams)
    depth = _depth(model, family)
    beyond = [layer for layer in hparams.layers if layer >= depth]
    if beyond:
        raise ArchitectureError(
            f"hyper-parameter layers names {beyond}, but the model has layers 0 to {depth - 1}"
        )
    if hparams.v_loss_layer not in (None, depth - 1):
        raise ArchitectureError(
            f"v_loss_layer is {hparams.v_loss_layer}, but the loss is read from the model's last "
            f"layer, {depth - 1}; set it to that, or remove the key"
        )
    down = _module(model, family.down_projection.format(hparams.target_layer))
    rows, columns = _weight_shape(down, family.down_projection)
    transposed = isinstance(down, Conv1D)
    value_width, key_width = (columns, rows) if transposed else (rows, columns)
    attention = _projection(model, family, hparams.target_layer, down, value_width)
    family = replace(family, attention_projection=attention, head=_head(model, family.head))
    return Layout(family, depth, value_width, key_width, transposed)


def _projection(
    model: nn.Module, family: Family, index: int, down: nn.Module, value_width: int
) -> str:
    """The name of the attention output projection; the given name may be that of its block."""
    template, known = family.attention_projection, _known(model)
    named = _module(model, template.format(index))
    if any(part is down for part in named.modules()):
        raise ArchitectureError(
            f"attn_module_tmp: {template} is or holds {family.down_projection}, whose weight is "
            "edited; name the attention output projection there, and the FFN down-projection in "
            "rewrite_module_tmps"
        )
    projection = named_projection(
        named,
        template,
        known=known.attention_projection if known else None,
        usual={f.attention_projection.rpartition(".")[2] for f in FAMILIES.values()},
        width=value_width,
    )
    parts = set(_module(model, family.layer.format(index)).modules())
    for name in (projection, family.down_projection):
        if _module(model, name.format(index)) not in parts:
            raise ArchitectureError(
                f"{name} is outside the layer {family.layer}; correct the names in the "
                "hyper-parameters, or remove them for a model of a known family"
            )
    return projection


def _head(model: nn.Module, name: str) -> str:
    """The name of the output embedding; the given name may be that of a tied input embedding."""
    if not isinstance(_module(model, name), nn.Embedding):
        return name
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for found, module in model.named_modules():
        if module is output:
            return found
    raise ArchitectureError(
        f"lm_head_module: {name} is the input embedding; name the module that computes the logits"
    )


def _known(model: nn.Module) -> Family | None:
    """The names in the table for a model whose family is in it, else None."""
    kind = _kind(model)
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def _kind(model: nn.Module) -> object:
    return getattr(getattr(model, "config", None), "model_type", None)


def _named(model: nn.Module, hparams: PMETHyperParams) -> Family:
    known = _known(model)
    names = {
        "layer_module_tmp": hparams.layer_module_tmp or (known and known.layer),
        "attn_module_tmp": hparams.attn_module_tmp or (known and known.attention_projection),
        "rewrite_module_tmps": hparams.down_projection_template
        or (known and known.down_projection),
        # Norm and head are facts of the model, not choices, and published files may use names of an
        # older transformers (GPT-NeoX's embed_out), so the table takes precedence.
        "ln_f_module": (known and known.final_norm) or hparams.ln_f_module,
        "lm_head_module": (known and known.head) or hparams.lm_head_module,
    }
    missing = [key for key, value in names.items() if not value]
    if missing:
        raise ArchitectureError(
            f"model type {_kind(model)!r} is not in the architecture table "
            f"({', '.join(sorted(FAMILIES))}); name its modules in the hyper-parameters: "
            f"{', '.join(missing)} "
            '(for example "rewrite_module_tmps": ["model.layers.{}.mlp.down_proj"])'
        )
    return Family(*(str(value) for value in names.values()))


def _depth(model: nn.Module, family: Family) -> int:
    prefix = family.layer.partition(".{}")[0]
    layers = _module(model, prefix)
    if not isinstance(layers, nn.ModuleList):
        raise ArchitectureError(f"{prefix} is a {type(layers).__name__}, not a list of layers")
    return len(layers)


def _weight_shape(module: nn.Module, name: str) -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        weight = torch.empty(0)
    shape = tuple(weight.shape)
    if len(shape) != 2 or not weight.is_floating_point():
        raise ArchitectureError(
            f"{name} is a {type(module).__name__} without a two-dimensional floating-point weight; "
            "name the FFN down-projection of an unquantized model in rewrite_module_tmps"
        )
    return int(shape[0]), int(shape[1])


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(
            f"{type(model).__name__} has no module {name}; correct its name in the "
            "hyper-parameters, or remove it for a model of a known family"
        ) from None


def part_with(layer: nn.Module, module: nn.Module) -> nn.Module:
    """The part of ``layer`` that is ``module`` or contains it."""
    return next(child for child in layer.children() if any(m is module for m in child.modules()))


def parts_beside(layer: nn.Module, attention: nn.Module) -> list[nn.Module]:
    """The parts of ``layer`` outside its attention that hold matrices: its FFN, in 1 or more."""
    return [
        child
        for child in layer.children()
        if child is not attention and any(map(is_matrix, child.modules()))
    ]


def is_matrix(module: nn.Module) -> bool:
    """Whether ``module`` multiplies every token by one matrix."""
    return isinstance(module, nn.Linear | Conv1D)
