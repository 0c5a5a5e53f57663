"""Running only the part of the model that the free vectors of a target can change.

δ affects nothing below layer z, no token before the subject's last one, and at layer z no other
token than that one. So

- the prefixes' attention keys and values are computed once (:mod:`pmet.model.prefix`);
- the suffixes go through the layers up to z once, which yields layer z's input and attention at
  the subject's last token, and its output at all other tokens;
- a step runs layer z after its attention on one token per row, the layers above on the suffixes,
  and the last layer after its attention, and the head, only where the loss reads.

One mechanism serves all families: prefixes end in the same column, so every suffix starts in the
next one; layers and modules that need not run are replaced by functions that return stored values;
and the model's own code builds positions and masks.

Shape letters: B rows, P prefix columns, S suffix columns, D model width, N places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad as padded

from pmet.errors import ArchitectureError
from pmet.model import (
    Layout,
    Prefixes,
    PrefixFiller,
    TokenizedPrompt,
    called,
    captured_input,
    captured_output,
    changed_input,
    changed_output,
    chosen,
    first,
    form_of,
    forward,
    layer_on_places,
    pad,
    part_with,
    passing,
    places_of_tokens,
    replaced,
    stopping_after,
    take,
    with_first,
)


@dataclass(frozen=True)
class _Rows:
    """The stored data of B prompts.

    Attributes:
        prefixes: keys and values of the layers above z; while steps run, with room for S columns.
        ids_BS: the suffixes' tokens.
        mask_BS: 1 for a token.
        hidden_BD: layer z's input at the subject's last token.
        attention_BD: its attention's output there, without δ_a.
        ffn_BD: its FFN's output there, without δ_f.
        output_BSD: its own output; only the columns after the first are ever used.
    """

    prefixes: Prefixes
    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    hidden_BD: torch.Tensor
    attention_BD: torch.Tensor
    ffn_BD: torch.Tensor
    output_BSD: torch.Tensor

    def with_room(self) -> _Rows:
        """The same, with room after the prefixes for the suffixes' keys and values."""
        count, columns = self.ids_BS.shape
        rows = torch.arange(count, device=self.ids_BS.device)
        return replace(self, prefixes=self.prefixes.kept(rows, room=columns))

    def kept(self, rows: torch.Tensor) -> _Rows:
        """Some rows; columns that hold only padding are dropped."""
        mask_BS = self.mask_BS.index_select(0, rows)
        columns = int(mask_BS.sum(1).max())
        return _Rows(
            self.prefixes.kept(rows, room=columns),
            self.ids_BS[:, :columns].index_select(0, rows),
            mask_BS[:, :columns],
            chosen(self.hidden_BD, rows),
            chosen(self.attention_BD, rows),
            chosen(self.ffn_BD, rows),
            chosen(self.output_BSD[:, :columns], rows),
        )

    def joined(self, others: _Rows) -> _Rows:
        """These rows, then others."""
        columns = max(self.ids_BS.shape[1], others.ids_BS.shape[1])
        both = (self, others)
        return _Rows(
            self.prefixes.joined(others.prefixes, room=columns),
            torch.cat([padded(r.ids_BS, (0, columns - r.ids_BS.shape[1])) for r in both]),
            torch.cat([padded(r.mask_BS, (0, columns - r.ids_BS.shape[1])) for r in both]),
            torch.cat([r.hidden_BD for r in both]),
            torch.cat([r.attention_BD for r in both]),
            torch.cat([r.ffn_BD for r in both]),
            torch.cat([padded(r.output_BSD, (0, 0, 0, columns - r.ids_BS.shape[1])) for r in both]),
        )


class SuffixRun:
    """Prompts prepared so that they can be run from layer z on repeatedly.

    Args:
        model: a causal language model in evaluation mode, its weights frozen.
        layout: the model's layout.
        layer: z.
        filler: computes the prefixes.
    """

    def __init__(self, model: nn.Module, layout: Layout, layer: int, filler: PrefixFiller) -> None:
        self._model, self._layout, self._layer = model, layout, layer
        self._filler = filler
        projection = layout.attention_projection(model, layer)
        self._attention = part_with(layout.layer(model, layer), projection)
        self._rows: _Rows | None = None
        # Places of the suffixes that hold tokens, if skipping padding pays.
        self._tokens_N: torch.Tensor | None = None
        # The form of the replaced modules' outputs, without their hidden states.
        self._below: list[Any] = []
        self._attended: Any = None

    @property
    def clean_attention(self) -> torch.Tensor:
        """The attention's output (B, D) at layer z and the subject's last token."""
        return self._held.attention_BD

    @property
    def clean_ffn(self) -> torch.Tensor:
        """The down-projection's output (B, D) at the same place."""
        return self._held.ffn_BD

    @property
    def keys_and_values(self) -> Iterator[torch.Tensor]:
        """The stored keys and values of the prefixes."""
        return self._held.prefixes.tensors

    @property
    def _held(self) -> _Rows:
        assert self._rows is not None, "no prompts have been added"
        return self._rows

    def add(self, prompts: Sequence[TokenizedPrompt], contexts: Sequence[int]) -> None:
        """Add prompts after the existing ones.

        Args:
            prompts: one per row.
            contexts: for each prompt, the number of its context in the filler.
        """
        prefixes = self._filler.fill([p.prefix for p in prompts], contexts)
        rows = self._read([p.suffix for p in prompts], prefixes)
        self._hold(rows.with_room() if self._rows is None else self._rows.joined(rows))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep some rows (ascending indices)."""
        self._hold(self._held.kept(rows) if len(rows) else None)

    def _hold(self, rows: _Rows | None) -> None:
        if rows is None:
            self._rows = self._tokens_N = None
            return
        self._rows = rows
        self._tokens_N = places_of_tokens(rows.mask_BS)

    @torch.no_grad()
    def _read(self, suffixes: Sequence[Sequence[int]], prefixes: Prefixes) -> _Rows:
        """Run suffixes through the layers up to z, and store what the steps need."""
        model, layout, z = self._model, self._layout, self._layer
        layer = layout.layer(model, z)
        projection = layout.attention_projection(model, z)
        ids_BS, mask_BS = pad(suffixes, prefixes.mask_BP.device)
        below: list[Any] = []
        attended: list[Any] = []
        with ExitStack() as stack:
            hidden = stack.enter_context(captured_input(layer))
            projected = stack.enter_context(captured_output(projection))
            attention = stack.enter_context(captured_output(self._attention))
            ffn = stack.enter_context(captured_output(layout.down_projection(model, z)))
            output = stack.enter_context(captured_output(layer))
            for module in (layout.layer(model, i) for i in range(z)):
                stack.callback(_shape_noted(module, below))
            stack.callback(_shape_noted(self._attention, attended))
            stack.enter_context(stopping_after(layer))
            forward(model, ids_BS, torch.cat([prefixes.mask_BP, mask_BS], 1), prefixes.cache())
        self._below, self._attended = below, attended[0]
        # NaN on both sides counts as unchanged: it affects only its own request.
        before, after = projected.tensor.flatten(), attention.tensor.flatten()
        if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
            raise ArchitectureError(
                f"layer {z} changes the output of {layout.family.attention_projection} before "
                "adding it to its hidden states, so δ_a cannot be added there; name the module "
                "whose output is added in attn_module_tmp"
            )
        # Some models flatten rows and columns inside the FFN (OPT).
        shape = (*ids_BS.shape, -1)
        return _Rows(
            prefixes.above(z),
            ids_BS,
            mask_BS,
            hidden.tensor[:, 0],
            attention.tensor.reshape(shape)[:, 0],
            ffn.tensor.reshape(shape)[:, 0],
            output.tensor,
        )

    def logits(
        self,
        attention_delta_BD: torch.Tensor,
        ffn_delta_BD: torch.Tensor,
        rows_N: torch.Tensor,
        columns_N: torch.Tensor,
    ) -> torch.Tensor:
        """Next-token logits (N, V) at places of the suffixes, with both deltas added at layer z.

        Each place may occur only once. Gradients flow to the deltas.
        """
        model, layout, rows = self._model, self._layout, self._held
        places_N = rows_N * rows.ids_BS.shape[1] + columns_N
        with (
            self._passing_below(),
            self._target_layer_on_one_token(attention_delta_BD, ffn_delta_BD),
            self._layers_above_where_needed(places_N),
            changed_input(
                layout.head(model), lambda hidden: take(hidden.flatten(0, 1), places_N)[None]
            ),
        ):
            mask = torch.cat([rows.prefixes.mask_BP, rows.mask_BS], dim=1)
            output = forward(model, rows.ids_BS, mask, rows.prefixes.cache())
        logits: torch.Tensor = output.logits[0]
        return logits

    @contextmanager
    def _passing_below(self) -> Iterator[None]:
        """Make the layers below z return their input, in the family's form of an output."""
        with ExitStack() as stack:
            for i, output in enumerate(self._below):
                layer = self._layout.layer(self._model, i)
                stack.enter_context(replaced(layer, passing(output)))
            yield

    @contextmanager
    def _target_layer_on_one_token(
        self, attention_delta_BD: torch.Tensor, ffn_delta_BD: torch.Tensor
    ) -> Iterator[None]:
        """Make layer z compute only the subject's last token; its other outputs are stored ones."""
        model, layout, z, rows = self._model, self._layout, self._layer, self._held
        layer = layout.layer(model, z)
        original = layer.forward
        attended = _added(rows.attention_BD, attention_delta_BD)[:, None]

        def on_one_token(
            _hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            output = called(original, rows.hidden_BD[:, None], args, kwargs)
            return with_first(output, torch.cat([first(output), rows.output_BSD[:, 1:]], dim=1))

        with (
            replaced(layer, on_one_token),
            replaced(self._attention, lambda *_: with_first(self._attended, attended)),
            changed_output(
                layout.down_projection(model, z),
                lambda output: _added(output, ffn_delta_BD.reshape(output.shape)),
            ),
        ):
            yield

    @contextmanager
    def _layers_above_where_needed(self, places_N: torch.Tensor) -> Iterator[None]:
        """Skip padding in the matrices above z, if there is much of it; and run everything after
        the last layer's attention only at the places that are read.
        """
        model, layout, last = self._model, self._layout, self._layout.depth - 1
        with ExitStack() as stack:
            for i in range(self._layer + 1, layout.depth):
                behind_N = places_N if i == last else self._tokens_N
                stack.enter_context(layer_on_places(model, layout, i, self._tokens_N, behind_N))
            yield


def _shape_noted(module: nn.Module, notes: list[Any]) -> Callable[[], None]:
    """Record the form of a module's output, without its tensors; return a function to stop."""

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        notes.append(form_of(output))

    return module.register_forward_hook(note).remove


def _added(output: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sum in the wider of both types, so that a small δ is not rounded before it is added."""
    wider = torch.promote_types(output.dtype, delta.dtype)
    return (output.to(wider) + delta.to(output.device)).to(output.dtype)
