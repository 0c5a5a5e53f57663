"""The parts of a model that the method needs, and their names.

The hyper-parameters decide which weights are edited and where δ_a is added. What they leave out is
found by trying a small copy of the model (``pmet.model.discovery``), so there is no table of
families. If the hyper-parameters name the attention block, as files of MEMIT do, δ_a is added to
the projection inside it (``pmet.model.output_projection``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pmet.errors import ArchitectureError
from pmet.hparams import PMETHyperParams
from pmet.model.discovery import is_stack, modules_in
from pmet.model.experts import Stacked
from pmet.model.found_parts import FoundParts, submodule
from pmet.model.miniature import Miniature
from pmet.model.output_projection import named_projection


@dataclass(frozen=True)
class Family:
    """Module names of one family; ``{}`` stands for the layer's number.

    Attributes:
        layer: a layer (block).
        attention_projection: the attention output projection.
        down_projection: the FFN's down-projection, or the experts that a token is routed to.
        head: the output embedding.
        stacked: the weight of these experts; None for a down-projection of every token.
    """

    layer: str
    attention_projection: str
    down_projection: str
    head: str = "lm_head"
    stacked: Stacked | None = None


@dataclass(frozen=True)
class Layout:
    """The parts of one model, located and checked.

    Attributes:
        family: names after applying the hyper-parameters; always of projections, never of blocks.
        depth: number of layers.
        value_width: V, the model's width.
        key_width: K, the FFN's inner width.
        transposed: the down-projection's weight is stored K×V (GPT-2's ``Conv1D``), not V×K.
        experts: X, the number of experts whose weights are stacked; 0 without experts.
    """

    family: Family
    depth: int
    value_width: int
    key_width: int
    transposed: bool
    experts: int = 0

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """The shape of a layer's second moment: (K, K), or (X, K, K) with experts."""
        square = (self.key_width, self.key_width)
        return (self.experts, *square) if self.experts else square

    @property
    def of_keys(self) -> str:
        """What its keys are, as the end of a sentence about them."""
        if self.experts:
            return f"are those of {self.experts} experts, {self.key_width} wide"
        return f"are {self.key_width} wide"

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """The layer (block) itself."""
        return submodule(model, self.family.layer.format(index))

    def down_projection(self, model: nn.Module, index: int) -> nn.Module:
        """The FFN down-projection of a layer: its input is the key, its output the value.

        With experts, the module that holds them all: its output is the value.
        """
        return submodule(model, self.family.down_projection.format(index))

    def attention_projection(self, model: nn.Module, index: int) -> nn.Module:
        """The attention output projection of a layer."""
        return submodule(model, self.family.attention_projection.format(index))

    def head(self, model: nn.Module) -> nn.Module:
        """The output embedding, from hidden states to logits."""
        return submodule(model, self.family.head)

    def weight_name(self, index: int) -> str:
        """Parameter name of a layer's edited weight."""
        return f"{self.family.down_projection.format(index)}.{self._own_name}"

    @property
    def _own_name(self) -> str:
        return self.family.stacked.weight if self.family.stacked else "weight"

    def weight(self, model: nn.Module, index: int) -> nn.Parameter:
        """A layer's edited weight."""
        weight = getattr(self.down_projection(model, index), self._own_name)
        assert isinstance(weight, nn.Parameter)
        return weight

    def orient(self, delta_VK: torch.Tensor) -> torch.Tensor:
        """``delta_VK`` in the parameter's orientation: V×K, or K×V if it is transposed.

        With experts, the last two of three dimensions.
        """
        return delta_VK.mT.contiguous() if self.transposed else delta_VK


def resolve(model: nn.Module, hparams: PMETHyperParams) -> Layout:
    """Find the parts of ``model``.

    Args:
        model: a causal language model whose parameters have their whole shapes; on *meta*, too.
        hparams: the layers, and names of modules, which take precedence over what is found.

    Raises:
        ArchitectureError: a part cannot be found, a named part does not exist, a layer number is
            beyond the model's depth, or what comes after a token changes it.
    """
    _check_order(model)
    family = _named(model, hparams)
    _check_numbers(hparams, _depth(model, family))
    layout = _layout_of_named(model, family, hparams.target_layer)
    if family.stacked:
        # Experts may be in some layers only.
        for layer in hparams.layers:
            _layout_of_named(model, family, layer)
    attention = _projection(model, layout, hparams.target_layer)
    return replace(layout, family=replace(family, attention_projection=attention))


def _layout_of_named(model: nn.Module, family: Family, layer: int) -> Layout:
    try:
        return layout_of(model, family, layer)
    except ArchitectureError as error:
        try:
            shown = FoundParts.of(model).described(layer)
        except ArchitectureError:
            raise error from None
        raise ArchitectureError(f"{error} (layer {layer} has {shown})") from None


def evidence(model: nn.Module, layout: Layout, layer: int) -> dict[str, str]:
    """What a small copy of the model shows about its parts, by the parts' names, for people.

    Args:
        model: the model.
        layout: its layout.
        layer: the last edited layer.
    """
    names = layout.family
    parts = (names.down_projection, names.attention_projection)
    try:
        found = FoundParts.of(model)
        shown = {f"{found.layers}.{layer}.{b.name}": b for b in found.branches(layer)}
    except ArchitectureError:
        return dict.fromkeys(parts, "named in the hyper-parameters; no small copy could be tried")
    said = "named in the hyper-parameters, but a layer's output does not show it"
    return {
        part: str(shown[name].effect) if (name := part.format(layer)) in shown else said
        for part in parts
    }


def layout_of(model: nn.Module, family: Family, layer: int) -> Layout:
    """The layout of ``model``, with widths as in ``layer``.

    Raises:
        ArchitectureError: the layer has no such parts.
    """
    depth = _depth(model, family)
    submodule(model, family.attention_projection.format(layer))
    down = submodule(model, family.down_projection.format(layer))
    if family.stacked:
        return _layout_of_experts(family, depth, down, family.stacked)
    rows, columns = _weight_shape(down, family.down_projection)
    transposed = isinstance(down, Conv1D)
    value_width, key_width = (columns, rows) if transposed else (rows, columns)
    return Layout(family, depth, value_width, key_width, transposed)


def _layout_of_experts(family: Family, depth: int, experts: nn.Module, stacked: Stacked) -> Layout:
    shape = tuple(getattr(getattr(experts, stacked.weight, None), "shape", ()))
    if len(shape) != 3:
        raise ArchitectureError(
            f"{family.down_projection} is a {type(experts).__name__} without a stacked weight "
            f"{stacked.weight}; name layers of one kind in the hyper-parameters"
        )
    count, rows, columns = shape
    value_width, key_width = (columns, rows) if stacked.transposed else (rows, columns)
    return Layout(family, depth, value_width, key_width, stacked.transposed, count)


def _check_order(model: nn.Module) -> None:
    """Refuse models in which what comes after a token, be it padding, changes it."""
    try:
        found = FoundParts.of(model)
    except ArchitectureError:
        return  # matters only if names are missing
    if not found.parts.causal:
        raise ArchitectureError(
            f"{type(model).__name__} lets tokens attend to later tokens, so the states before a "
            "subject depend on what follows; edit a causal model (is_decoder in config.json)"
        )
    if not found.parts.padded:
        raise ArchitectureError(
            f"{type(model).__name__} computes something else for a prompt if a longer one is run "
            "beside it, so no two prompts can be compared; edit another model"
        )


def _check_numbers(hparams: PMETHyperParams, depth: int) -> None:
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


def layers_with(small: Miniature, family: Family) -> list[int]:
    """The layers of a miniature that have a family's parts, and can be edited."""
    found = []
    for layer in range(len(small.layers)):
        try:
            layout_of(small.model, family, layer)
        except ArchitectureError:
            continue
        found.append(layer)
    return found


def layers_of_each_kind(small: Miniature, family: Family) -> list[int]:
    """One layer of each kind among those with a family's parts, with others around if possible."""
    by_kind: dict[object, list[int]] = {}
    for layer in layers_with(small, family):
        block = submodule(small.model, family.layer.format(layer))
        by_kind.setdefault(modules_in(block), []).append(layer)
    return [
        layers[len(layers) // 2] if len(layers) > 2 else layers[0] for layers in by_kind.values()
    ]


def _projection(model: nn.Module, layout: Layout, index: int) -> str:
    """The name of the attention output projection; the given name may be that of its block."""
    family, down = layout.family, layout.down_projection(model, index)
    template = family.attention_projection
    named = submodule(model, template.format(index))
    if any(part is down for part in named.modules()):
        raise ArchitectureError(
            f"attn_module_tmp: {template} is or holds {family.down_projection}, whose weight is "
            "edited; name the attention output projection there, and the FFN down-projection in "
            "rewrite_module_tmps"
        )
    projection = named_projection(
        named,
        template,
        found=lambda: _found_attention(model, index),
        width=layout.value_width,
    )
    parts = set(submodule(model, family.layer.format(index)).modules())
    for name in (projection, family.down_projection):
        if submodule(model, name.format(index)) not in parts:
            raise ArchitectureError(
                f"{name} is outside the layer {family.layer}; correct the names in the "
                "hyper-parameters, or remove them"
            )
    return projection


def _head(model: nn.Module, named: str | None) -> str:
    """The name of the output embedding.

    A fact of the model, not a choice, and published files may use names of an older transformers
    (GPT-NeoX's embed_out); so what the model says takes precedence.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for found, module in model.named_modules():
        if module is output:
            return found
    if named is None:
        raise ArchitectureError(
            f"{type(model).__name__} does not say which module computes the logits; name it in the "
            "hyper-parameters: lm_head_module"
        )
    if isinstance(submodule(model, named), nn.Embedding):
        raise ArchitectureError(
            f"lm_head_module: {named} is the input embedding; name the module that computes the "
            "logits"
        )
    return named


def _named(model: nn.Module, hparams: PMETHyperParams) -> Family:
    """The names that the hyper-parameters give; those they leave out are found."""
    layer, attention = hparams.layer_module_tmp, hparams.attn_module_tmp
    down, head = hparams.down_projection_template, _head(model, hparams.lm_head_module)
    if not (layer and attention and down):
        found = FoundParts.of(model)
        layer = layer or f"{found.layers}.{{}}"
        attention = attention or f"{layer}.{found.attention(hparams.target_layer)}"
        down = down or f"{layer}.{found.down_projection(hparams.layers)}"
    down = _experts_of(model, down, hparams.target_layer)
    return Family(layer, attention, down, head, _stacked(model, down, hparams.target_layer))


def _experts_of(model: nn.Module, template: str, layer: int) -> str:
    """The name of the experts if ``template`` names their stacked weight, which is no module."""
    parent, _, own = template.rpartition(".")
    try:
        weight = getattr(model.get_submodule(parent.format(layer)), own, None)
    except AttributeError:
        return template
    return parent if isinstance(weight, nn.Parameter) and weight.dim() == 3 else template


def _stacked(model: nn.Module, template: str, layer: int) -> Stacked | None:
    """The stacked weight of the experts that ``template`` names; None if it names none.

    Raises:
        ArchitectureError: their keys cannot be read.
    """
    name = template.format(layer)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if not is_stack(module):
        return None
    if (stacked := FoundParts.of(model).stacked(layer, name)) is None:
        raise ArchitectureError(
            f"{template} holds several experts whose keys cannot be read: a small copy of "
            f"{type(model).__name__} does not show that their output is the gated sum of one "
            "stacked weight's; name a down-projection that every token passes through"
        )
    return stacked


def _found_attention(model: nn.Module, index: int) -> str | None:
    """The attention output projection of a layer, as a small copy shows it; None if it does not."""
    try:
        found = FoundParts.of(model)
        return f"{found.layers}.{{}}.{found.attention(index)}"
    except ArchitectureError:
        return None


def _depth(model: nn.Module, family: Family) -> int:
    prefix = family.layer.partition(".{}")[0]
    layers = submodule(model, prefix)
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


def part_with(layer: nn.Module, module: nn.Module) -> nn.Module:
    """The part of ``layer`` that is ``module`` or contains it."""
    return next(child for child in layer.children() if any(m is module for m in child.modules()))


def parts_beside(layer: nn.Module, attention: nn.Module) -> list[nn.Module]:
    """The parts of ``layer`` outside its attention that hold matrices: its FFN, in 1 or more."""
    return [
        child
        for child in layer.children()
        if child is not attention and any(is_matrix(m) or is_stack(m) for m in child.modules())
    ]


def is_matrix(module: nn.Module) -> bool:
    """Whether ``module`` multiplies every token by one matrix."""
    return isinstance(module, nn.Linear | Conv1D)
