"""Which way of running prompts is exact for a model: suffixes alone, or whole.

Handing in the keys and values of prefixes relies on how a family's code builds masks, positions and
caches. Whether that holds is tried on the model's miniature: the same prompts run both ways, with
the same changes, and logits and gradients are compared.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import nn

from pmet.errors import ArchitectureError
from pmet.model import (
    SAME,
    Family,
    Layout,
    Miniature,
    NoMiniatureError,
    PrefixFiller,
    TokenizedPrompt,
    farthest_apart,
    in_one_line,
    layers_of_each_kind,
    layout_of,
    miniature_of,
    tuned,
)
from pmet.targets.suffix import SuffixRun
from pmet.targets.whole import WholeRun

# Of different lengths before and after the subject's last token, which starts one of them.
_PROMPTS = [
    TokenizedPrompt((3, 5, 8, 2, 7, 1), 3),
    TokenizedPrompt((3, 5, 4, 6, 2, 7, 8, 1, 5), 5),
    TokenizedPrompt((6, 4, 8), 0),
    TokenizedPrompt((3, 2, 7, 4, 1, 8, 6), 2),
]


def why_whole(model: nn.Module, layout: Layout) -> str | None:
    """Why prompts of a model must run whole; None if suffixes alone give the same.

    Args:
        model: the model, which may be on *meta* or partitioned: only its configuration is read.
        layout: the model's layout.

    Raises:
        ArchitectureError: not even whole prompts can be run.
    """
    try:
        small = miniature_of(model)
    except NoMiniatureError as error:
        return f"no small copy of it can be tried ({error})"
    return _difference(small, layout.family)


@cache
def _difference(small: Miniature, family: Family) -> str | None:
    """How both ways differ on a miniature, at any layer that has the parts; None: they agree."""
    layers = layers_of_each_kind(small, family)
    for layer in layers:
        own = layout_of(small.model, family, layer)
        try:
            whole = _outcome(small, own, layer, whole=True)
        except Exception as error:
            raise ArchitectureError(
                f"{type(small.model).__name__} cannot run prompts of different lengths side by "
                f"side ({in_one_line(error)}), as a small copy of it shows; edit another model"
            ) from error
        try:
            suffix = _outcome(small, own, layer)
        except ArchitectureError:
            return "its layers are of several kinds"
        except Exception as error:  # noqa: BLE001 - whatever a family's code raises
            return in_one_line(error)
        apart = farthest_apart(suffix, whole)
        if not apart <= SAME:
            return f"logits or gradients differ by {apart:.1e}"
    return None if layers else "its small copy has no such layers"


def _outcome(
    small: Miniature, layout: Layout, layer: int, *, whole: bool = False
) -> list[torch.Tensor]:
    """Logits at some places under some changes at a layer, and the gradients of their mean."""
    model = small.model
    generator = torch.Generator().manual_seed(layer)
    longest = 2 * max(len(prompt.ids) for prompt in _PROMPTS)
    with nullcontext() if whole else tuned(model, longest):
        run: SuffixRun | WholeRun
        if whole:
            run = WholeRun(model, layout, layer)
        else:
            filler = PrefixFiller(model, layout, [[prompt.prefix for prompt in _PROMPTS]])
            run = SuffixRun(model, layout, layer, filler)
        run.add(_PROMPTS[:2], [0, 0])
        run.add(_PROMPTS[2:], [0, 0])
        run.keep(torch.tensor([0, 1, 3]))
        kept = [_PROMPTS[0], _PROMPTS[1], _PROMPTS[3]]
        size = run.clean_ffn.norm() / run.clean_ffn.numel() ** 0.5
        deltas = torch.randn(2, len(kept), layout.value_width, generator=generator) * size
        deltas.requires_grad_(True)
        places = [(row, column) for row, p in enumerate(kept) for column in range(len(p.suffix))]
        rows_N, columns_N = torch.tensor(places).T
        with torch.enable_grad():
            logits_NV = run.logits(deltas[0], deltas[1], rows_N, columns_N)
            weights_NV = torch.randn(logits_NV.shape, generator=generator)
            (gradient,) = torch.autograd.grad((logits_NV * weights_NV).mean(), deltas)
    return [logits_NV.detach(), gradient[0], gradient[1], run.clean_attention, run.clean_ffn]
