"""The names of a model's parts, as a small copy of it shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pmet.errors import ArchitectureError
from pmet.model.discovery import Anatomy, Branch, UnknownAnatomyError, anatomy, modules_in
from pmet.model.experts import Stacked
from pmet.model.miniature import Miniature, NoMiniatureError, miniature_of


@dataclass(frozen=True)
class FoundParts:
    """What a small copy of a model shows about the model's own layers."""

    model: nn.Module
    small: Miniature
    parts: Anatomy

    @classmethod
    def of(cls, model: nn.Module) -> FoundParts:
        """Try a small copy of ``model``.

        Raises:
            ArchitectureError: none can be built, or it does not show its parts.
        """
        try:
            small = miniature_of(model)
            return cls(model, small, anatomy(small))
        except (NoMiniatureError, UnknownAnatomyError) as error:
            raise ArchitectureError(
                f"the parts of {type(model).__name__} could not be found by trying a small copy "
                f"of it ({error}); name them in the hyper-parameters: layer_module_tmp, "
                "attn_module_tmp, rewrite_module_tmps (for example "
                '["model.layers.{}.mlp.down_proj"])'
            ) from None

    @property
    def layers(self) -> str:
        """The name of the list of layers."""
        return self.parts.layers

    def attention(self, index: int) -> str:
        """The name of the attention output projection within a layer."""
        found = [branch.name for branch in self.branches(index) if branch.mixes]
        if len(found) > 1:
            # Layers that mix tokens in several ways (Falcon-H1): δ_a belongs to the attention.
            found = [name for name in found if "attn" in name or "attention" in name]
        if len(found) != 1:
            raise ArchitectureError(
                f"layer {index} of {type(self.model).__name__} has no attention output projection, "
                f"but {self.described(index)}, so δ_a has no place there; name another last layer "
                "in layers, or edit a model with attention in its edited layers"
            )
        return found[0]

    def down_projection(self, layers: Sequence[int]) -> str:
        """The name of the FFN down-projection within each of some layers."""
        names = {index: self._ffn(index) for index in layers}
        if len(set(names.values())) > 1:
            listed = ", ".join(f"{name} in layer {index}" for index, name in names.items())
            raise ArchitectureError(
                f"the edited layers of {type(self.model).__name__} have different FFNs ({listed}); "
                "name layers of one kind in the hyper-parameters"
            )
        return names[layers[0]]

    def _ffn(self, index: int) -> str:
        branches = [branch for branch in self.branches(index) if not branch.mixes]
        found = [branch.name for branch in branches if not branch.experts]
        if found:
            # Beside its FFN a layer may add a projection of the token's own embedding (Gemma 4),
            # which is narrow.
            return max(found, key=lambda name: self._size(index, name))
        experts = [branch for branch in branches if branch.experts]
        if len(experts) == 1 and experts[0].stacked:
            return experts[0].name
        if experts:
            raise ArchitectureError(
                f"layer {index} of {type(self.model).__name__} sends each token to some of several "
                f"experts ({', '.join(branch.name for branch in experts)}) whose keys cannot be "
                "read, because their output is not the gated sum of one stacked weight's, and it "
                f"has no FFN that every token passes through; {self._with_ffn()}"
            )
        raise ArchitectureError(
            f"layer {index} of {type(self.model).__name__} has no FFN down-projection, but "
            f"{self.described(index)}; {self._with_ffn()}"
        )

    def _size(self, index: int, name: str) -> int:
        weight = submodule(self.model, f"{self.layers}.{index}.{name}").weight
        assert isinstance(weight, torch.Tensor)
        return weight.numel()

    def _with_ffn(self) -> str:
        """What to do instead."""
        depth = len(list(self._blocks(self.model)))
        dense = [
            index
            for index in range(depth)
            if any(not b.mixes and (b.stacked or not b.experts) for b in self.branches(index))
        ]
        if not dense:
            return "edit a model with such FFNs"
        return f"name layers among those that have one: {', '.join(map(str, dense))}"

    def stacked(self, index: int, name: str) -> Stacked | None:
        """The stacked weight of a layer's experts, by the experts' full name; None if none is."""
        named = {f"{self.layers}.{index}.{b.name}": b.stacked for b in self.branches(index)}
        return named.get(name)

    def described(self, index: int) -> str:
        """What writes to the residual stream in a layer, for people."""
        said = [f"{branch.name} ({_kind(branch)})" for branch in self.branches(index)]
        return ", ".join(said) or "no matrix that writes to the residual stream"

    def branches(self, index: int) -> tuple[Branch, ...]:
        """The branches of one of the model's layers, as those of a layer like it in the copy."""
        blocks = list(self._blocks(self.model))
        if index >= len(blocks):
            raise ArchitectureError(
                f"hyper-parameter layers names [{index}], but the model has layers 0 to "
                f"{len(blocks) - 1}"
            )
        shape = modules_in(blocks[index])
        pairs = zip(self._blocks(self.small.model), self.parts.branches, strict=True)
        for block, branches in pairs:
            if modules_in(block) == shape:
                return branches
        raise ArchitectureError(
            f"layer {index} of {type(self.model).__name__} is like none of its small copy's layers "
            "(its configuration lists no kinds of layers); name its parts in the hyper-parameters: "
            "layer_module_tmp, attn_module_tmp, rewrite_module_tmps"
        )

    def _blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        yield from model.get_submodule(self.layers).children()


def _kind(branch: Branch) -> str:
    if branch.experts:
        return "several experts"
    return "mixes tokens" if branch.mixes else "FFN"


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by its name.

    Raises:
        ArchitectureError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(
            f"{type(model).__name__} has no module {name}; correct its name in the "
            "hyper-parameters, or remove the key"
        ) from None
