"""Keys and current values: what the edited layers see of each request.

The key of a request at a layer is the down-projection's input at the subject's last token,
averaged over context templates, each group of them weighing the same: half the bare context, half
the mean of the generated ones. The current value is the down-projection's output at layer z in the
bare context.

Shape letters: E requests, C contexts, B = E·C rows, T tokens, K key width, V value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet.architecture import Layout
from pmet.contexts import ContextTemplates
from pmet.lookup import tokenize_prompt
from pmet.padding import pad, positions
from pmet.request import EditRequest
from pmet.tracing import captured_input, captured_output, stopping_after

Forward = Callable[..., Any]

KEY_BATCH = 64
"""Requests whose keys are read in one forward pass."""


@dataclass(frozen=True)
class Lookups:
    """Tokens of a batch of requests, up to the subject's last one, in every context.

    Nothing after the subject's last token reaches back to it, so nothing after it is kept; rows
    are padded on the left, which puts that token into the last column.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    group_sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        templates: ContextTemplates,
        device: torch.device,
    ) -> Lookups:
        """Tokenize ``requests`` in every template."""
        rows = []
        for request in requests:
            for template in (t for group in templates for t in group):
                prompt = tokenize_prompt(tokenizer, request, template)
                rows.append(prompt.ids[: prompt.subject_last + 1])
        ids_BT, mask_BT = pad(rows, device, left=True)
        return cls(ids_BT, mask_BT, tuple(len(group) for group in templates))

    @property
    def contexts(self) -> int:
        """C, rows of one request."""
        return sum(self.group_sizes)

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of a forward pass; the head reads one column only."""
        accepted = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": self.ids_BT,
            "attention_mask": self.mask_BT,
            "use_cache": False,
        }
        if "position_ids" in accepted:
            inputs["position_ids"] = positions(self.mask_BT)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        return inputs

    def mean_over_contexts(self, rows_BK: torch.Tensor) -> torch.Tensor:
        """Mean over groups of the means within them: (B, K) to (E, K), in float64."""
        grouped = rows_BK.double().unflatten(0, (-1, self.contexts)).split(self.group_sizes, dim=1)
        return torch.stack([group.mean(dim=1) for group in grouped]).mean(dim=0)


@torch.no_grad()
def read_keys_and_values(
    model: nn.Module,
    layout: Layout,
    lookups: Lookups,
    layer: int,
    target_layer: int,
    *,
    forward: Forward | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys at ``layer`` and current values at ``target_layer``, from one forward pass.

    Args:
        model: the model whose modules are traced.
        layout: its parts.
        lookups: the requests' tokens.
        layer: the layer about to be edited, at most ``target_layer``.
        target_layer: layer z.
        forward: what runs the model to its end, for a model that must not be stopped early
            (ZeRO-3); by default the model itself runs, up to layer z.

    Returns:
        ``keys_EK`` and ``values_EV``, float64, on the model's device.
    """
    rows, columns = lookups.ids_BT.shape
    with ExitStack() as stack:
        key = stack.enter_context(captured_input(layout.down_projection(model, layer)))
        value = stack.enter_context(captured_output(layout.down_projection(model, target_layer)))
        if forward is None:
            stack.enter_context(stopping_after(layout.layer(model, target_layer)))
            forward = model
        forward(**lookups.inputs(model))
    # Some models flatten rows and columns inside the FFN (OPT).
    keys_BK = key.tensor.reshape(rows, columns, -1)[:, -1]
    values_BV = value.tensor.reshape(rows, columns, -1)[:, -1]
    return lookups.mean_over_contexts(keys_BK), values_BV[:: lookups.contexts].double()
