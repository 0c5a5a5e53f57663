"""Running only what the free vectors of a target can change.

Nothing below layer z, and no token before the subject's last one, depends on δ. So the prefixes
(all tokens before the subject's last) go through the model once and leave their attention keys and
values in a cache; the suffixes go through the layers below z once and leave their hidden states;
and every step of the optimisation runs the suffixes through layer z and those above it.

One mechanism serves all families: prefixes are padded on the left, so that every suffix starts in
the same column; layers below z are replaced by stand-ins that pass their input on, and layer z is
handed the stored hidden states. The model's own code still builds positions and masks.

Shape letters: B rows, P prefix columns, S suffix columns, D model width, N places, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from pmet.architecture import Layout
from pmet.lookup import TokenizedPrompt
from pmet.padding import pad, positions
from pmet.tracing import (
    captured_input,
    captured_output,
    changed_input,
    changed_output,
    first,
    stopping_after,
)


class _PrefixLayer(DynamicLayer):
    """Attention keys and values of the prefixes in one layer.

    The first update fills it; later ones see prefix ++ new and leave nothing behind, so a step
    can be repeated. It is as long as the prefixes are also when its tensors have been dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.filled = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.filled:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
            return key_states, value_states
        if self.keys is None:
            return key_states, value_states
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )

    def get_seq_length(self) -> int:
        return self.length

    def close(self, length: int, padding_BP: torch.Tensor) -> None:
        """End the filling; padding is zeroed, so that no NaN of a row without a prefix spreads."""
        self.length, self.filled = length, True
        if self.keys is not None:
            self.keys = self.keys.masked_fill(padding_BP[:, None, :, None], 0)
            self.values = self.values.masked_fill(padding_BP[:, None, :, None], 0)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        if self.keys is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def drop(self) -> None:
        """Free the tensors of a layer that will not run again."""
        self.keys = self.values = None  # type: ignore[assignment]


class SuffixRun:
    """A batch of prompts, ready to be run from layer z on as often as needed.

    Attributes:
        clean_attention_BD: attention projection's output at layer z and the subject's last token.
        clean_ffn_BD: the down-projection's output there.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, layer: int, prompts: Sequence[TokenizedPrompt]
    ) -> None:
        self._model, self._layout, self._layer = model, layout, layer
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        device = layout.weight(model, layer).device
        prefixes, self._prefix_mask = pad([p.prefix for p in prompts], device, left=True)
        self._suffixes, suffix_mask = pad([p.suffix for p in prompts], device)
        self._mask = torch.cat([self._prefix_mask, suffix_mask], dim=1)
        self._cache = Cache(layers=[_PrefixLayer() for _ in range(layout.depth)])
        with torch.no_grad():
            self._fill(prefixes)
            self._run_below()

    @torch.no_grad()
    def _fill(self, prefixes_BP: torch.Tensor) -> None:
        length = prefixes_BP.shape[1]
        if length:
            top = self._layout.layer(self._model, self._layout.depth - 1)
            with stopping_after(top):
                self._forward(prefixes_BP, self._prefix_mask, length)
        for cached in self._cache.layers:
            cached.close(length, self._prefix_mask == 0)

    @torch.no_grad()
    def _run_below(self) -> None:
        model, layout = self._model, self._layout
        self._below = [layout.layer(model, i) for i in range(self._layer)]
        wrapped = []
        with ExitStack() as stack:
            hidden = stack.enter_context(captured_input(layout.layer(model, self._layer)))
            attention = stack.enter_context(
                captured_output(layout.attention_projection(model, self._layer))
            )
            ffn = stack.enter_context(captured_output(layout.down_projection(model, self._layer)))
            for below in self._below:
                handle = below.register_forward_hook(
                    lambda _m, _a, output: wrapped.append(
                        len(output) if isinstance(output, tuple) else 0
                    )
                )
                stack.callback(handle.remove)
            stack.enter_context(stopping_after(layout.layer(model, self._layer)))
            self._forward(self._suffixes, self._mask, self._suffixes.shape[1])
        self._wrapped = wrapped
        self._hidden_BSD = hidden.tensor
        rows, columns = self._suffixes.shape
        # Some models flatten rows and columns inside the FFN (OPT).
        self.clean_attention_BD = attention.tensor.reshape(rows, columns, -1)[:, 0]
        self.clean_ffn_BD = ffn.tensor.reshape(rows, columns, -1)[:, 0]
        for cached in self._cache.layers[: self._layer]:
            cached.drop()

    def logits(
        self,
        attention_delta_BD: torch.Tensor,
        ffn_delta_BD: torch.Tensor,
        rows_N: torch.Tensor,
        columns_N: torch.Tensor,
    ) -> torch.Tensor:
        """Next-token logits (N, V) at places of the suffixes, with both deltas added at layer z.

        The head reads only the places asked for. Gradients flow to the deltas.
        """
        model, layout, z = self._model, self._layout, self._layer
        with (
            self._passing_below(),
            changed_input(layout.layer(model, z), lambda _: self._hidden_BSD),
            changed_output(
                layout.attention_projection(model, z),
                lambda output: self._added(output, attention_delta_BD),
            ),
            changed_output(
                layout.down_projection(model, z), lambda output: self._added(output, ffn_delta_BD)
            ),
            changed_input(layout.head(model), lambda hidden: hidden[rows_N, columns_N][None]),
        ):
            output = self._forward(self._suffixes, self._mask, self._suffixes.shape[1])
        return output.logits[0]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep some rows (ascending indices); columns that only padding is left in go away."""
        columns = int(self._mask[rows, self._cache.get_seq_length() :].sum(1).max())
        length = self._cache.get_seq_length()
        self._suffixes = self._suffixes[rows, :columns]
        self._mask = self._mask[rows, : length + columns]
        self._hidden_BSD = self._hidden_BSD[rows, :columns]
        self.clean_attention_BD = self.clean_attention_BD[rows]
        self.clean_ffn_BD = self.clean_ffn_BD[rows]
        for cached in self._cache.layers[self._layer :]:
            cached.keep(rows)

    def _added(self, output: torch.Tensor, delta_BD: torch.Tensor) -> torch.Tensor:
        rows, columns = self._suffixes.shape
        hidden_BSD = output.reshape(rows, columns, -1)
        padding = hidden_BSD.new_zeros(rows, columns - 1, hidden_BSD.shape[-1])
        change_BSD = torch.cat([delta_BD.to(hidden_BSD.dtype)[:, None], padding], dim=1)
        return (hidden_BSD + change_BSD).reshape(output.shape)

    def _forward(self, ids_BT: torch.Tensor, mask_BU: torch.Tensor, columns: int) -> Any:
        inputs: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": mask_BU,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if self._takes_positions:
            inputs["position_ids"] = positions(mask_BU)[:, -columns:]
        return self._model(**inputs)

    @contextmanager
    def _passing_below(self) -> Iterator[None]:
        """Replace the layers below z by stand-ins that keep the family's output convention."""
        try:
            for layer, size in zip(self._below, self._wrapped, strict=True):
                layer.forward = _stand_in(size)
            yield
        finally:
            for layer in self._below:
                layer.__dict__.pop("forward", None)


def _stand_in(size: int) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = first(args[0] if args else kwargs["hidden_states"])
        return (hidden, *[None] * (size - 1)) if size else hidden

    return forward
