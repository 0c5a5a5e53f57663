"""Second moments: uncentred E[k kᵀ] of the keys over ordinary text, one per edited layer.

Papers call C a covariance, but it is not one, because no mean is subtracted from the keys. One pass
over the text serves all layers, and partial sums add up over batches, parts and workers.

Shape letters: B texts, T tokens, N tokens of a batch without padding, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pmet.errors import InputError
from pmet.hparams import PMETHyperParams
from pmet.model import (
    Layout,
    RoutedKeys,
    batches_by_tokens,
    changed_input,
    chosen,
    context_length,
    encode,
    frozen,
    home,
    noting_routed_keys,
    pad,
    resolve,
    stopping_after,
)

MAX_TOKENS = 1024
"""Documents are truncated here, or at the model's context if that is shorter."""
BATCH_TOKENS = 4096
TOKENS_PER_DIMENSION = 2
"""Tokens per dimension of a key that second moments should rest on at least."""
_STRIPS, _NARROWEST_STRIP = 8, 128


@dataclass
class SecondMoments:
    """Sums of k kᵀ by layer in float64, and the number of tokens they cover.

    Attributes:
        sums: (K, K) by layer; with X experts (X, K, K), of each expert's keys times their gates.
        tokens: number of tokens.
        routed: with experts, the number of tokens routed to each, (X,) int64 by layer.
    """

    sums: dict[int, torch.Tensor]
    tokens: int = 0
    routed: dict[int, torch.Tensor] = field(default_factory=dict)

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
        for layer, count_X in other.routed.items():
            self.routed[layer] = self.routed[layer] + count_X if layer in self.routed else count_X
        self.tokens += other.tokens

    def means(self) -> dict[int, torch.Tensor]:
        """E[k kᵀ] by layer, (K, K) float64, or (X, K, K); see `expert_means`.

        Raises:
            InputError: no token has been seen.
        """
        if not self.tokens:
            raise InputError("the corpus holds no token; second moments need text")
        return {
            layer: torch.stack(list(expert_means(total, self.routed[layer], self.tokens)))
            if layer in self.routed
            else total / self.tokens
            for layer, total in self.sums.items()
        }


def expert_means(
    totals_XKK: Iterable[torch.Tensor],
    routed_X: torch.Tensor,
    tokens: int,
    power: float | None = None,
) -> Iterator[torch.Tensor]:
    """The second moment of each expert, over all tokens, whether routed to it or not.

    An expert that saw fewer than `TOKENS_PER_DIMENSION` tokens per dimension of its keys counts as
    having seen the missing ones, with keys of no preferred direction and the mean power of all
    experts' keys. So C_i is positive definite, however rarely the text uses an expert, and a
    well-known one's is what the text shows.

    Args:
        totals_XKK: each expert's sum of g² k kᵀ, (K, K) float64.
        routed_X: number of tokens routed to each.
        tokens: number of tokens of the text.
        power: `mean_power`; None: computed from the sums.

    Yields:
        (K, K) float64 by expert.
    """
    if power is None:
        totals_XKK = list(totals_XKK)
        power = mean_power(sum(t.trace().item() for t in totals_XKK), routed_X, len(totals_XKK[0]))
    for total_KK, routed in zip(totals_XKK, routed_X.tolist(), strict=True):
        mean_KK = total_KK / tokens
        missing = max(0, TOKENS_PER_DIMENSION * len(total_KK) - routed)
        mean_KK.diagonal().add_(missing * power / tokens)
        yield mean_KK


def mean_power(traces: float, routed_X: torch.Tensor, key_width: int) -> float:
    """The mean square of an element of a routed key, from the sum of the sums' traces."""
    return traces / (key_width * max(1, int(routed_X.sum())))


Norms = tuple[float, float]


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
    return convergence_of([half_norms(one_KK, other_KK, tokens)], tokens)


def convergence_of(norms: Sequence[Norms], tokens: tuple[int, int]) -> float:
    """The same for a second moment of several matrices, from the `half_norms` of each."""
    n, m = tokens
    apart, whole = (math.hypot(*each) for each in zip(*norms, strict=True))
    return math.sqrt(n * m) / (n + m) * apart / whole if whole else math.nan


def half_norms(one_KK: torch.Tensor, other_KK: torch.Tensor, tokens: tuple[int, int]) -> Norms:
    """‖A − B‖ and ‖C‖ of `convergence`."""
    n, m = tokens
    apart = torch.linalg.norm(one_KK / n - other_KK / m)
    whole = torch.linalg.norm(one_KK + other_KK) / (n + m)
    return apart.item(), whole.item()


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
    devices = {i: layout.weight(model, i).device for i in hparams.layers}
    moments = SecondMoments(
        {
            i: torch.zeros(layout.moment_shape, dtype=torch.float64, device=device)
            for i, device in devices.items()
        }
    )
    if layout.experts:
        none_X = torch.zeros(layout.experts, dtype=torch.int64)
        moments.routed = {i: none_X.to(device, copy=True) for i, device in devices.items()}
    with frozen(model):
        for batch in batches_by_tokens(ordered, BATCH_TOKENS, len):
            _add_batch(model, layout, batch, moments)
    for total in moments.sums.values():
        for total_KK in total.view(-1, *total.shape[-2:]):
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

    def real(rows_N: torch.Tensor) -> torch.Tensor:
        return chosen(rows_N.reshape(mask_BT.numel(), -1), real_N)

    with ExitStack() as stack:
        for layer, total in moments.sums.items():
            # Summed during the pass: no layer's keys are stored.
            module = layout.down_projection(model, layer)
            if stacked := layout.family.stacked:
                adding = _adding_routed(total, moments.routed[layer])
                noting = noting_routed_keys(module, stacked, adding, real if padded else None)
                stack.enter_context(noting)
            else:
                stack.enter_context(changed_input(module, adding_to(total)))
        stack.enter_context(stopping_after(layout.layer(model, layers[-1])))
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    moments.tokens += len(real_N)


def _adding_routed(
    totals_XKK: torch.Tensor, routed_X: torch.Tensor
) -> Callable[[RoutedKeys], None]:
    """A function that adds the keys of a batch to the sums of their experts, and counts them."""

    def add(keys: RoutedKeys) -> None:
        counts_X = keys.experts_P.bincount(minlength=len(routed_X))
        routed_X.add_(counts_X)
        ordered_PK = chosen(keys.keys_PK, keys.experts_P.argsort(stable=True))
        for expert, keys_NK in enumerate(ordered_PK.split(counts_X.tolist())):
            if len(keys_NK):
                _add_product(totals_XKK[expert], keys_NK)

    return add


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
