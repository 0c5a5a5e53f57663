"""Second moments: uncentred E[k kᵀ] of the keys over ordinary text, one per edited layer.

Papers call C a covariance; nothing is subtracted from the keys, so it is not one. One pass over the
text serves all layers, and partial sums add up over batches, shards and workers.

Shape letters: B texts, T tokens, K key width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet.architecture import Layout, resolve
from pmet.errors import InputError
from pmet.hparams import PMETHyperParams
from pmet.lookup import encode
from pmet.padding import batches_by_tokens, pad
from pmet.problem import context_length
from pmet.tracing import captured_input, frozen, stopping_after

MAX_TOKENS = 1024
"""Documents are cut here, or at the model's context where that is shorter."""
BATCH_TOKENS = 4096


@dataclass
class SecondMoments:
    """Sums of k kᵀ by layer in float64, and the number of tokens they cover."""

    sums: dict[int, torch.Tensor]
    tokens: int = 0

    def add(self, layer: int, keys_NK: torch.Tensor) -> None:
        """Add the keys of some tokens at one layer; ``tokens`` is counted apart."""
        keys = keys_NK.double()
        if layer in self.sums:
            self.sums[layer].addmm_(keys.T, keys)
        else:
            self.sums[layer] = keys.T @ keys

    def merge(self, other: SecondMoments) -> None:
        """Add the sums of another part of the text.

        Raises:
            ValueError: the other part is of other layers.
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


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    hparams: PMETHyperParams,
    *,
    max_tokens: int = MAX_TOKENS,
) -> SecondMoments:
    """Sum k kᵀ over all tokens of ``texts`` at every edited layer, in one pass.

    Each text is read by itself, as the tokenizer gives it, and cut at ``max_tokens``.
    """
    layout = resolve(model, hparams)
    limit = min(max_tokens, context_length(model.config) or max_tokens)
    sequences = sorted((encode(tokenizer, text)[:limit] for text in texts), key=len)
    moments = SecondMoments({})
    with frozen(model):
        for batch in batches_by_tokens([s for s in sequences if s], BATCH_TOKENS, len):
            _add_batch(model, layout, batch, hparams.layers, moments)
    return moments


def _add_batch(
    model: nn.Module,
    layout: Layout,
    batch: Sequence[tuple[int, ...]],
    layers: Sequence[int],
    moments: SecondMoments,
) -> None:
    device = layout.weight(model, layers[-1]).device
    ids_BT, mask_BT = pad(batch, device)
    with ExitStack() as stack:
        seen = {
            layer: stack.enter_context(captured_input(layout.down_projection(model, layer)))
            for layer in layers
        }
        stack.enter_context(stopping_after(layout.layer(model, layers[-1])))
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    real = mask_BT.flatten().bool()
    for layer, keys in seen.items():
        moments.add(layer, keys.tensor.reshape(real.numel(), -1)[real])
    moments.tokens += int(real.sum())
