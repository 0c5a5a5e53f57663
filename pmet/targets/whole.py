"""Running prompts whole, for models whose prefixes cannot be computed once and handed in.

Some models keep something else of earlier tokens than attention keys and values (a recurrent
state), or build masks and positions in ways that handed-in keys and values do not fit (ALiBi). For
them every evaluation runs every prompt from its first token, padded on the right, where a causal
model never looks. That is as slow as it sounds, and exact for any causal model.

Shape letters: B rows, T tokens of the longest, D model width, N places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from pmet.model import (
    Layout,
    TokenizedPrompt,
    captured_output,
    changed_input,
    changed_output,
    home,
    pad,
    take,
)


class WholeRun:
    """Prompts that can be run repeatedly with changes at layer z.

    The same interface as `pmet.targets.suffix.SuffixRun`.

    Args:
        model: a causal language model in evaluation mode, its weights frozen.
        layout: the model's layout.
        layer: z.
    """

    def __init__(self, model: nn.Module, layout: Layout, layer: int) -> None:
        self._model, self._head = model, layout.head(model)
        self._projection = layout.attention_projection(model, layer)
        self._down = layout.down_projection(model, layer)
        self._prompts: list[TokenizedPrompt] = []
        self._attention_BD = self._ffn_BD = torch.empty(0)

    @property
    def clean_attention(self) -> torch.Tensor:
        """The attention projection's output (B, D) at layer z and the subject's last token."""
        return self._attention_BD

    @property
    def clean_ffn(self) -> torch.Tensor:
        """The down-projection's output (B, D) at the same place."""
        return self._ffn_BD

    @property
    def keys_and_values(self) -> Iterator[torch.Tensor]:
        """None: nothing is kept from pass to pass."""
        return iter(())

    @torch.no_grad()
    def add(self, prompts: Sequence[TokenizedPrompt], _contexts: Sequence[int]) -> None:
        """Add prompts after the existing ones."""
        ids_BT, mask_BT = pad([prompt.ids for prompt in prompts], home(self._model))
        with (
            captured_output(self._projection) as attention,
            captured_output(self._down) as ffn,
            changed_input(self._head, lambda hidden: hidden[:, :1]),
        ):
            self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        places_B = _subjects(prompts, ids_BT)
        found = [take(seen.tensor.flatten(0, -2), places_B) for seen in (attention, ffn)]
        held = [self._attention_BD, self._ffn_BD] if self._prompts else [found[0][:0], found[1][:0]]
        self._attention_BD, self._ffn_BD = (
            torch.cat(pair) for pair in zip(held, found, strict=True)
        )
        self._prompts += prompts

    def keep(self, rows: torch.Tensor) -> None:
        """Keep some rows (ascending indices)."""
        self._prompts = [self._prompts[row] for row in rows.tolist()]
        self._attention_BD = self._attention_BD[rows]
        self._ffn_BD = self._ffn_BD[rows]

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
        ids_BT, mask_BT = pad([prompt.ids for prompt in self._prompts], home(self._model))
        subjects_B = _subjects(self._prompts, ids_BT)
        places_N = subjects_B[rows_N] + columns_N
        with (
            _added_at(self._projection, subjects_B, attention_delta_BD),
            _added_at(self._down, subjects_B, ffn_delta_BD),
            changed_input(self._head, lambda hidden: take(hidden.flatten(0, 1), places_N)[None]),
        ):
            output = self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits


def _subjects(prompts: Sequence[TokenizedPrompt], ids_BT: torch.Tensor) -> torch.Tensor:
    """The place (row · T + column) of each prompt's subject's last token, (B,)."""
    columns = torch.tensor([prompt.subject_last for prompt in prompts], device=ids_BT.device)
    return torch.arange(len(prompts), device=ids_BT.device) * ids_BT.shape[1] + columns


def _added_at(
    module: nn.Module, places_B: torch.Tensor, delta_BD: torch.Tensor
) -> AbstractContextManager[None]:
    """Within: ``delta_BD`` is added to the module's output at places, in the wider dtype."""

    def change(output: torch.Tensor) -> torch.Tensor:
        wider = torch.promote_types(output.dtype, delta_BD.dtype)
        flat = output.flatten(0, -2).to(wider)
        here_B, added_BD = places_B.to(output.device), delta_BD.to(output.device, wider)
        return flat.index_add(0, here_B, added_BD).to(output.dtype).view(output.shape)

    return changed_output(module, change)
