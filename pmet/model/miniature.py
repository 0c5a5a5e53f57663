"""A model's architecture in small: its own code with a few narrow layers and random weights.

What a family's code does cannot be read off its configuration: which modules write to the residual
stream, whether attention keys and values can be handed in. On a copy that takes milliseconds to run
it can be tried. Numbers of layers, heads and tokens and all widths shrink; whatever else a
configuration says (kinds of layers, positions, norms, activations) stays as it is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import nn

from pmet.model.transformers_internals import attention_code

DEPTH = 4
"""Layers of a miniature, unless the model has more kinds of layers or fewer layers."""
VOCABULARY = 96
"""Most tokens of a miniature's vocabulary."""

_HEADS = 4
_HEAD_WIDTH = 8
_WIDTH = _HEADS * _HEAD_WIDTH
_INNER_WIDTH = 48
_MOST_EXPERTS = 32
_MOST_AT_ONCE = 16  # tokens that a recurrent layer reads at once
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Attention with compressed keys (DeepSeek) gives heads a part with positions and one without.
_POSITION_WIDTH = 4
_MOST_PARAMETERS = 50_000_000
# Wide enough that every part of a narrow layer matters; the usual 0.02 would make a model this
# narrow almost linear.
_SPREAD = 1.5


SAME = 1e-3
"""Two ways of computing the same are this close on a miniature: rounding in float32 is some 1e-6 of
the norm, and ways that differ in meaning are apart by 1e-2 and more.
"""


class _Heads(Enum):
    """What happens to the attention's heads."""

    NARROW = auto()
    FEW = auto()
    SAME = auto()


class NoMiniatureError(Exception):
    """No small copy of a model can be built from its configuration; the message says why."""


@dataclass(frozen=True)
class Miniature:
    """A small copy of a model, in evaluation mode, float32, on the CPU.

    Attributes:
        model: the copy.
        layers: for each of its layers, the layer of the whole model that it stands for. Every
            kind of layer that the configuration lists occurs.
    """

    model: nn.Module
    layers: tuple[int, ...]


def holds(model: nn.Module, check: Callable[[nn.Module], bool]) -> bool:
    """Whether a check holds on a model's miniature; not if there is none, or if it fails there.

    Args:
        model: the model.
        check: a function of a module, so that its result is remembered.
    """
    try:
        small = miniature_of(model)
    except NoMiniatureError:
        return False
    return _holds(small, check)


@cache
def _holds(small: Miniature, check: Callable[[nn.Module], bool]) -> bool:
    try:
        return check(small.model)
    except Exception:  # noqa: BLE001 - whatever a family's code raises
        return False


def farthest_apart(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest distance between tensors and their counterparts, relative to the counterparts."""
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(some, others, strict=True)
    )


def in_one_line(error: Exception) -> str:
    """What a family's code has raised, as part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


# The reason, where there is none.
_made: dict[tuple[type, str], Miniature | str] = {}


def miniature_of(model: nn.Module) -> Miniature:
    """The miniature of a transformers model; the model may be on *meta*. Made once per process.

    A miniature is its own.

    Raises:
        NoMiniatureError: its configuration cannot be made smaller.
    """
    for made in _made.values():
        if isinstance(made, Miniature) and made.model is model:
            return made
    config: Any = model.config
    key = (
        type(model),
        json.dumps([attention_code(config), config.to_dict()], sort_keys=True, default=str),
    )
    if key not in _made:
        try:
            _made[key] = _miniature(type(model), config)
        except NoMiniatureError as error:
            _made[key] = str(error)
    found = _made[key]
    if isinstance(found, str):
        raise NoMiniatureError(found)
    return found


def _miniature(kind: type[nn.Module], config: Any) -> Miniature:
    reasons = []
    # The narrowest first. Where head widths depend on each other in ways not known here, heads keep
    # their width, or their number, too.
    for heads in _Heads:
        try:
            small, layers = _smaller(config, heads)
            return Miniature(_built(kind, small), layers)
        except Exception as error:  # noqa: BLE001 - any family's code may fail in any way
            reasons.append(
                str(error) if isinstance(error, NoMiniatureError) else in_one_line(error)
            )
    raise NoMiniatureError("; ".join(dict.fromkeys(reasons)))


def _built(kind: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > _MOST_PARAMETERS:
        raise NoMiniatureError(f"its smallest copy has {size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval().float().requires_grad_(False)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=_SPREAD * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
        with torch.no_grad():
            model(input_ids=torch.arange(1, 7)[None], use_cache=False)
    return model


def _smaller(config: Any, heads: _Heads) -> tuple[Any, tuple[int, ...]]:
    """A configuration with fewer layers and tokens and smaller widths, and which layers stay."""
    small = copy.deepcopy(config)
    layers: tuple[int, ...] = ()
    for part in _sections(small):
        kept = _shortened(part)
        layers = layers or kept
        _with_few_tokens(part)
        _narrowed(part, heads)
    text = small.get_text_config(decoder=True)
    return small, layers or tuple(range(int(text.num_hidden_layers)))


def _sections(config: Any) -> Iterator[Any]:
    """A configuration's sections, the language model's first, then the configuration itself."""
    text = config.get_text_config(decoder=True)
    yield text
    for value in vars(config).values():
        if hasattr(value, "to_dict") and value is not text:
            yield value
    if text is not config:
        yield config


def _shortened(config: Any) -> tuple[int, ...]:
    """Keep a few layers of every kind; return their numbers."""
    depth = _number(config, "num_hidden_layers")
    if not depth:
        return ()
    by_layer = [k for k, v in vars(config).items() if _is_by_layer(v, depth)]
    # The last layers of some models read the attention keys and values of earlier ones (Gemma 4).
    sharing = _number(config, "num_kv_shared_layers") or 0
    kinds = [repr([getattr(config, k)[i] for k in by_layer]) for i in range(depth)]
    kept = _one_of_each([f"{i >= depth - sharing} {kind}" for i, kind in enumerate(kinds)])
    for key in by_layer:
        values = getattr(config, key)
        _set(config, key, type(values)(values[i] for i in kept))
    _set(config, "num_hidden_layers", len(kept))
    if sharing:
        _set(config, "num_kv_shared_layers", sum(i >= depth - sharing for i in kept))
    return kept


def _is_by_layer(value: object, depth: int) -> bool:
    """Whether a setting has a value for each layer; numbers that all differ number something."""
    if not isinstance(value, list | tuple) or len(value) != depth:
        return False
    numbers = {v for v in value if isinstance(v, int) and not isinstance(v, bool)}
    return depth <= 2 or len(numbers) < depth


def _one_of_each(kinds: Sequence[str]) -> tuple[int, ...]:
    """The first layer of every kind, and the lowest others up to ``DEPTH`` in all."""
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    kept = set(first.values())
    for i in range(len(kinds)):
        if len(kept) >= DEPTH:
            break
        kept.add(i)
    return tuple(sorted(kept))


def _with_few_tokens(config: Any) -> None:
    for key, value in list(vars(config).items()):
        if key.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            _set(config, key, 0)
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if vocabulary := _number(config, key):
            _set(config, key, min(vocabulary, VOCABULARY))


def _narrowed(config: Any, heads: _Heads) -> None:
    """Smaller widths of FFNs and, as far as ``heads`` says, of the attention."""
    for key in vars(config):
        inner = key.endswith(("intermediate_size", "ffn_dim")) or key == "n_inner"
        if inner and _number(config, key):
            _set(config, key, _INNER_WIDTH)
    # Of the layers without experts one will do: there are four layers in all.
    if many := _number(config, "first_k_dense_replace"):
        _set(config, "first_k_dense_replace", min(many, 1))
    for key in _EXPERTS:
        if count := _number(config, key):
            _set(config, key, min(count, _MOST_EXPERTS))
    for key in vars(config):
        if key.endswith("chunk_size") and (tokens := _number(config, key)):
            _set(config, key, min(tokens, _MOST_AT_ONCE))
    many = _number(config, "num_attention_heads")
    if heads is _Heads.SAME or not many:
        return
    own_width = _number(config, "head_dim") or (_number(config, "hidden_size") or 0) // many
    _set(config, "num_attention_heads", _HEADS)
    if shared := _number(config, "num_key_value_heads"):
        _set(config, "num_key_value_heads", _HEADS if shared == many else 1 if shared == 1 else 2)
    if heads is _Heads.FEW:
        _set(config, "hidden_size", _HEADS * own_width)
        return
    in_parts = _number(config, "qk_rope_head_dim") is not None
    widths = {
        "hidden_size": _WIDTH,
        "head_dim": _POSITION_WIDTH if in_parts else _HEAD_WIDTH,
        "kv_channels": _HEAD_WIDTH,
        "v_head_dim": _HEAD_WIDTH,
        "qk_nope_head_dim": _HEAD_WIDTH,
        "qk_rope_head_dim": _POSITION_WIDTH,
        "rotary_dim": _POSITION_WIDTH,
        "q_lora_rank": _WIDTH // 2,
        "kv_lora_rank": _WIDTH // 2,
        "linear_head_dim": _HEAD_WIDTH,
        "linear_key_head_dim": _HEAD_WIDTH,
        "linear_value_head_dim": _HEAD_WIDTH,
        "linear_num_heads": _HEADS,
        "linear_num_key_heads": _HEADS // 2,
        "linear_num_value_heads": _HEADS,
        "hidden_size_per_layer_input": _HEAD_WIDTH,
    }
    if (times := _number(config, "mamba_expand")) and not _number(config, "mamba_d_ssm"):
        widths |= {"mamba_d_head": _HEAD_WIDTH, "mamba_n_heads": times * _HEADS}
    for key, width in widths.items():
        if _number(config, key):
            _set(config, key, width)
    # Rotations by time, height and width share a head's pairs of components (Qwen 2 VL).
    for key in ("rope_parameters", "rope_scaling"):
        rotation = getattr(config, key, None)
        if isinstance(rotation, dict) and "mrope_section" in rotation:
            rotation["mrope_section"] = [_HEAD_WIDTH // 2 - 2, 1, 1]


def _number(config: Any, key: str) -> int | None:
    try:
        value = getattr(config, key, None)
    except Exception:  # noqa: BLE001 - some configurations refuse keys that differ by layer
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _set(config: Any, key: str, value: object) -> None:
    """Set a key, unless the configuration computes it from others."""
    try:
        setattr(config, key, value)
    except AttributeError:
        return
