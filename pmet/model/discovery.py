"""Finding the parts of a model that the method needs, by trying its miniature.

A decoder layer adds a few outputs to the residual stream. Each comes from a matrix: the attention
output projection, the FFN down-projection. They are told apart from the others, and from each
other, by what a change does (activation patching; Vig et al. 2020, arXiv 2004.12265): hold the
outputs of all other matrices of the model's width at their recorded values, and

- change a matrix's output at one token: if the layer's output changes, it comes last in its branch;
- change the layer's input at an earlier token: if the matrix's input at a later one changes, its
  branch mixes tokens, so it is the attention's, else the FFN's.

Names play no part in this, so a new family needs no entry anywhere.

Shape letters: T tokens, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pmet.model.experts import Stacked, stacked_in
from pmet.model.miniature import SAME, Miniature, farthest_apart
from pmet.model.tokenization import pad
from pmet.model.tracing import changed_input, changed_output, first

_NUMBER = re.compile(r"\d+")
_TOKENS = torch.tensor([[5, 3, 8, 2, 7, 1, 4]])
_EARLIER, _AT = 2, 4  # places in them
# Effects are compared with rounding in float32, which is below this share of what is changed.
_ROUNDING = 1e-4


class Effect(StrEnum):
    """How a branch's last matrix reaches the residual stream."""

    ADDED = "added to the residual stream"
    SCALED = "added to the residual stream, times a constant"
    NORMED = "added to the residual stream after a norm"


@dataclass(frozen=True)
class Branch:
    """A matrix whose output a layer adds to the residual stream.

    Attributes:
        name: its name within the layer.
        mixes: whether its input depends on earlier tokens: attention, not an FFN.
        effect: how its output arrives.
        experts: whether it is a stack of matrices, of which a token sees some.
        stacked: their stacked weight; None if there is none that their keys can be read with.
    """

    name: str
    mixes: bool
    effect: Effect
    experts: bool = False
    stacked: Stacked | None = None


@dataclass(frozen=True)
class Anatomy:
    """What a miniature shows of its model.

    Attributes:
        layers: name of the list of layers.
        head: name of the output embedding.
        branches: for each layer of the miniature, its branches, in the order of their definition.
        causal: whether a token is never affected by later ones.
        padded: whether a prompt is the same beside a longer one, with padding behind it.
    """

    layers: str
    head: str
    branches: tuple[tuple[Branch, ...], ...]
    causal: bool
    padded: bool


class UnknownAnatomyError(Exception):
    """A miniature does not show its parts; the message says what is missing."""


@cache
@torch.no_grad()
def anatomy(small: Miniature) -> Anatomy:
    """Find the parts of a miniature.

    Raises:
        UnknownAnatomyError: it has no list of layers in which each passes its hidden states on to
            the next, or no output embedding.
    """
    model = small.model
    layers = _list_of_layers(model)
    blocks: Sequence[nn.Module] = list(model.get_submodule(layers).children())
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((name for name, module in model.named_modules() if module is output), None)
    if not isinstance(output, nn.Module) or head is None:
        raise UnknownAnatomyError("it has no output embedding")
    # One layer of each kind will do.
    found: dict[frozenset[tuple[str, type]], tuple[Branch, ...]] = {}
    for block in blocks:
        kind = modules_in(block)
        found[kind] = found.get(kind) or tuple(_branches(model, block))
    branches = tuple(found[modules_in(block)] for block in blocks)
    return Anatomy(layers, head, branches, _is_causal(model), _takes_padding(model))


def modules_in(layer: nn.Module) -> frozenset[tuple[str, type]]:
    """Names and types of a layer's modules, whatever the number of its experts: its kind."""
    return frozenset((_NUMBER.sub("{}", n), type(m)) for n, m in layer.named_modules())


def _run(model: nn.Module, ids: torch.Tensor = _TOKENS) -> Any:
    return model(input_ids=ids, use_cache=False)


def _list_of_layers(model: nn.Module) -> str:
    """The longest list of modules of which each one's output is the next one's input."""
    lists = {n: list(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and m}
    members = {module for modules in lists.values() for module in modules}
    with _recorded(members) as calls:
        _run(model)
    passing = [name for name, modules in lists.items() if _hand_on(modules, calls)]
    if not passing:
        raise UnknownAnatomyError(
            "it has no list of layers in which each one's output is the next one's input"
        )
    return max(passing, key=lambda name: len(lists[name]))


def _hand_on(modules: Sequence[nn.Module], calls: Mapping[nn.Module, list[_Call]]) -> bool:
    if any(len(calls[module]) != 1 for module in modules):
        return False
    seen = [calls[module][0] for module in modules]
    if any(call.output.dim() != 3 or call.given.shape != call.output.shape for call in seen):
        return False
    return all(torch.equal(call.output, then.given) for call, then in pairwise(seen))


@dataclass(frozen=True)
class _Call:
    """The first input and the output of a module in one pass."""

    given: torch.Tensor
    output: torch.Tensor


@contextmanager
def _recorded(modules: set[nn.Module]) -> Iterator[Mapping[nn.Module, list[_Call]]]:
    """Within: the calls of modules, in order."""
    calls: dict[nn.Module, list[_Call]] = {module: [] for module in modules}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        result = first(output)
        if isinstance(given, torch.Tensor) and isinstance(result, torch.Tensor):
            calls[module].append(_Call(given.clone(), result.clone()))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield calls


def _branches(model: nn.Module, layer: nn.Module) -> Iterator[Branch]:
    names = {module: name for name, module in layer.named_modules() if _is_weight(module)}
    with _recorded({layer, *names}) as calls:
        _run(model)
    (whole,) = calls[layer]
    tokens, width = whole.output.shape[1:]
    # Those that run on every token once; some models flatten rows and tokens.
    wide = {
        module: calls[module][0]
        for module in names
        if len(calls[module]) == 1 and calls[module][0].output.numel() == tokens * width
    }
    trial = _Trial(model, layer, whole, wide)
    effects = {module: trial.effect(module) for module in wide}
    last = {module for module, effect in effects.items() if effect is not None}
    for module, effect in effects.items():
        if effect is not None:
            mixes = trial.mixes(module, last - {module})
            experts = is_stack(module)
            stacked = stacked_in(module, lambda: _run(model), SAME) if experts else None
            yield Branch(names[module], mixes, effect, experts, stacked)


def _is_weight(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix, or by the matrices of several experts."""
    return isinstance(module, nn.Linear | Conv1D) or is_stack(module)


def is_stack(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts, stacked."""
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Conv1d) and any(p.dim() == 3 for p in own)


@dataclass(frozen=True)
class _Trial:
    """A layer that is run with the outputs of some of its matrices held at their clean values."""

    model: nn.Module
    layer: nn.Module
    whole: _Call
    wide: Mapping[nn.Module, _Call]

    def effect(self, module: nn.Module) -> Effect | None:
        """How a change of a matrix's output at a token changes the layer's; None: not at all."""
        clean = self.wide[module].output
        width = self.whole.output.shape[-1]
        generator = torch.Generator().manual_seed(1)
        change_D = torch.randn(width, generator=generator) * clean.std()
        changed = clean.clone()
        changed.view(-1, width)[_AT] += change_D
        with self._held(set(self.wide) - {module}), _output_replaced(module, changed):
            moved_TD = (self._output() - self.whole.output)[0]
        if moved_TD.norm() <= _ROUNDING * change_D.norm():
            return None
        moved_D = moved_TD[_AT]
        scale = moved_D @ change_D / change_D.square().sum()
        if (moved_D - scale * change_D).norm() > 10 * _ROUNDING * moved_D.norm():
            return Effect.NORMED
        return Effect.ADDED if abs(scale - 1) < 10 * _ROUNDING else Effect.SCALED

    def mixes(self, module: nn.Module, held: set[nn.Module]) -> bool:
        """Whether a matrix's input depends on the layer's input at an earlier token.

        Args:
            module: the matrix.
            held: the last matrices of the layer's other branches.
        """
        clean = self.wide[module].given
        generator = torch.Generator().manual_seed(2)
        change_D = torch.randn(self.whole.given.shape[-1], generator=generator)

        def shifted(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, _EARLIER] += change_D * self.whole.given.std()
            return hidden

        with self._held(held), _recorded({module}) as calls, changed_input(self.layer, shifted):
            _run(self.model)
        at = calls[module][0].given.view(-1, clean.shape[-1])[_AT]
        before = clean.view(-1, clean.shape[-1])[_AT]
        return bool((at - before).norm() > _ROUNDING * before.norm())

    @contextmanager
    def _held(self, modules: set[nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_output_replaced(module, self.wide[module].output))
            yield

    def _output(self) -> torch.Tensor:
        with _recorded({self.layer}) as calls:
            _run(self.model)
        return calls[self.layer][0].output


def _output_replaced(module: nn.Module, output: torch.Tensor) -> AbstractContextManager[None]:
    return changed_output(module, lambda _own: output.clone())


def _is_causal(model: nn.Module) -> bool:
    changed = _TOKENS.clone()
    changed[0, -1] += 1
    before = len(_TOKENS[0]) - 1
    one, other = (_run(model, ids).logits[0, :before] for ids in (_TOKENS, changed))
    return farthest_apart([one], [other]) <= SAME


def _takes_padding(model: nn.Module) -> bool:
    short = _TOKENS[0, :_AT].tolist()
    ids, mask = pad([_TOKENS[0].tolist(), short], torch.device("cpu"))
    beside = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    alone = [_run(model, ids).logits[0] for ids in (_TOKENS, _TOKENS[:, :_AT])]
    return farthest_apart([beside[0], beside[1, :_AT]], alone) <= SAME
