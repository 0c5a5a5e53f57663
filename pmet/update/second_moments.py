"""Second moments: uncentred E[k kᵀ] of the keys over ordinary text, one per edited layer.

Papers call C a covariance, but it is not one, because no mean is subtracted from the keys. One pass
over the text serves all layers, and partial sums add up over batches, parts and workers.

Shape letters: B texts, T tokens, N tokens of a batch without padding, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet.errors import InputError
from pmet.hparams import PMETHyperParams
from pmet.model import (
    Layout,
    batches_by_tokens,
    changed_input,
    chosen,
    context_length,
    encode,
    frozen,
    home,
    pad,
    resolve,
    stopping_after,
)

MAX_TOKENS = 1024
"""Documents are truncated here, or at the model's context if that is shorter."""
BATCH_TOKENS = 4096
_STRIPS, _NARROWEST_STRIP = 8, 128


@dataclass
class SecondMoments:
    """Sums of k kᵀ by layer in float64, and the number of tokens they cover."""

    sums: dict[int, torch.Tensor]
    tokens: int = 0

    def merge(self, other: SecondMoments) -> None:
        """Add the sums of another part of the text.

        Raises:
            ValueError: the other part has other layers.
        """
        if self.sums and self.sums.keys() != other.sums.keys():
            raise ValueError(f"layers {sorted(self.sums)} and {sorted(other.sums)} do not add up")
        for layer, total in other.sums.items():
            if layer in self.sums:
                self.sums[layer] += total
            else:
                self.sums[layer] = total.clone()
        self.tokens += other.tokens

    def means(self) -> dict[int, torch.Tensor]:
        """E[k kᵀ] by layer, (K, K) float64.

        Raises:
            InputError: no token has been seen.
        """
        if not self.tokens:
            raise InputError("the corpus holds no token; second moments need text")
        return {layer: total / self.tokens for layer, total in self.sums.items()}


def convergence(one_KK: torch.Tensor, other_KK: torch.Tensor, tokens: tuple[int, int]) -> float:
    """An estimate of a second moment's error, from the sums over two halves of its text.

    With A and B the means over the halves, n and m their tokens, and C the mean over both,

        √(n·m) / (n + m) · ‖A − B‖ / ‖C‖        (Frobenius norms; half of ‖A − B‖ / ‖C‖ if n = m)

    estimates the relative distance of C from its limit for unlimited text of the same kind: if
    the halves are independent, E‖A − B‖² = (1/n + 1/m)·v and E‖C − limit‖² = v/(n + m) for the
    same v. It falls as one over the square root of the number of tokens.

    Args:
        one_KK: sum of k kᵀ over one half, (K, K) float64.
        other_KK: the same over the other.
        tokens: number of tokens of each half, at least one.
    """
    n, m = tokens
    apart = torch.linalg.norm(one_KK / n - other_KK / m)
    whole = torch.linalg.norm(one_KK + other_KK) / (n + m)
    return float(math.sqrt(n * m) / (n + m) * apart / whole)


def longest(model_config: Any, max_tokens: int = MAX_TOKENS) -> int:
    """The maximum length of documents: ``max_tokens``, or the model's context if shorter."""
    return min(max_tokens, context_length(model_config) or max_tokens)


def measure(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    hparams: PMETHyperParams,
    *,
    max_tokens: int = MAX_TOKENS,
) -> SecondMoments:
    """Sum k kᵀ over all tokens of ``texts`` at every edited layer, in one pass.

    Each text is read separately, as the tokenizer encodes it, and truncated to ``max_tokens``.
    """
    limit = longest(model.config, max_tokens)
    return measure_tokens(model, [encode(tokenizer, text)[:limit] for text in texts], hparams)


@torch.no_grad()
def measure_tokens(
    model: nn.Module, sequences: Iterable[Sequence[int]], hparams: PMETHyperParams
) -> SecondMoments:
    """Do the same as `measure` for tokenised texts; only the texts decide which are batched.

    Returns:
        Each layer's sum on the layer's device.
    """
    layout = resolve(model, hparams)
    ordered = sorted((s for s in sequences if len(s)), key=len)
    shape = (layout.key_width, layout.key_width)
    moments = SecondMoments(
        {
            i: torch.zeros(shape, dtype=torch.float64, device=layout.weight(model, i).device)
            for i in hparams.layers
        }
    )
    with frozen(model):
        for batch in batches_by_tokens(ordered, BATCH_TOKENS, len):
            _add_batch(model, layout, batch, moments)
    for total_KK in moments.sums.values():
        _mirror(total_KK)
    return moments


def _add_batch(
    model: nn.Module, layout: Layout, batch: Sequence[Sequence[int]], moments: SecondMoments
) -> None:
    layers = list(moments.sums)
    ids_BT, mask_BT = pad(batch, home(model))
    real_N = mask_BT.flatten().nonzero().squeeze(1)
    padded = len(real_N) < mask_BT.numel()

    def adding_to(total_KK: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(keys_BTK: torch.Tensor) -> torch.Tensor:
            keys_NK = keys_BTK.reshape(mask_BT.numel(), -1)
            _add_product(total_KK, chosen(keys_NK, real_N) if padded else keys_NK)
            return keys_BTK

        return add

    with ExitStack() as stack:
        for layer, total_KK in moments.sums.items():
            # Summed during the pass: no layer's keys are stored.
            module = layout.down_projection(model, layer)
            stack.enter_context(changed_input(module, adding_to(total_KK)))
        stack.enter_context(stopping_after(layout.layer(model, layers[-1])))
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    moments.tokens += len(real_N)


def _add_product(total_KK: torch.Tensor, keys_NK: torch.Tensor) -> None:
    """Add kᵀk of a batch to the strips of ``total_KK`` on and above the diagonal.

    The product is symmetric, so ``_mirror`` fills in the rest. Over the few thousand tokens of
    one batch it is computed in float32, twice as fast: that costs 4e-8 of the norm, less than
    rounding in the forward pass. Batches add up in float64.
    """
    # Other code in this process may have allowed lower precision for float32 products (TF32).
    whole = torch.get_float32_matmul_precision() == "highest"
    for part_NK in keys_NK.to(torch.float32 if whole else torch.float64).split(BATCH_TOKENS):
        for rows in _strips(len(total_KK)):
            total_KK[rows, rows.start :] += part_NK[:, rows].T @ part_NK[:, rows.start :]


def _mirror(total_KK: torch.Tensor) -> None:
    """Fill the part below the diagonal strips from the part above."""
    for rows in _strips(len(total_KK)):
        total_KK[rows.stop :, rows] = total_KK[rows, rows.stop :].T


def _strips(width: int) -> Iterator[slice]:
    step = max(_NARROWEST_STRIP, -(-width // _STRIPS))
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))
