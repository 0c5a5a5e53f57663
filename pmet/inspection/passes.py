"""Statements run whole through a model: the answer's probability, and outputs at the subject.

A *statement* is a request's prompt followed by one of its targets. The probability of a target is
the geometric mean over its tokens, exp(−NLL), as everywhere in this project and in the evaluation
of MEMIT and PMET; for a target of one token it is the probability that ROME traces.

Shape letters: B rows, T tokens of the longest, D model width, N target tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pmet.errors import ArchitectureError, RequestError
from pmet.model import (
    Layout,
    captured_output,
    changed_input,
    changed_output,
    context_length,
    home,
    pad,
    subject_first,
    take,
    tokenize_prompt,
    tokenize_target,
)
from pmet.request import EditRequest

Part = Literal["hidden", "ffn", "attention"]
PARTS: tuple[Part, ...] = ("hidden", "ffn", "attention")
"""What is read and changed of a layer: its own output, and those of its two projections."""


@dataclass(frozen=True)
class Statement:
    """A prompt and a target, in tokens.

    Attributes:
        ids: all tokens but the target's last, which predicts nothing.
        first: index of the subject's first token.
        last: index of its last token.
        answer: the target's tokens.
    """

    ids: tuple[int, ...]
    first: int
    last: int
    answer: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, request: EditRequest, target: str) -> Statement:
        """Tokenize a request's prompt with a target.

        Raises:
            RequestError: subject or target have no tokens.
        """
        prompt = tokenize_prompt(tokenizer, request)
        answer = tokenize_target(tokenizer, request, target)
        first = subject_first(tokenizer, request)
        return cls(prompt.ids + answer[:-1], first, prompt.subject_last, answer)

    @property
    def subject(self) -> tuple[int, ...]:
        """The subject's tokens."""
        return self.ids[self.first : self.last + 1]

    def check_length(self, config: Any, *, room: int = 0) -> None:
        """Refuse a statement that a model cannot read whole, with ``room`` tokens before it.

        Raises:
            RequestError: naming the lengths.
        """
        limit = context_length(config)
        if limit is not None and len(self.ids) + room > limit:
            raise RequestError(
                f"the prompt takes {len(self.ids) + room} tokens with its context and target, but "
                f"the model reads {limit}; shorten it"
            )


class Rows:
    """Statements side by side, padded on the right, where a causal model never looks.

    Args:
        model: the model that will run them.
        layout: its layout.
        statements: one for each row.

    Attributes:
        ids_BT: tokens.
        lasts_B: place (row · T + column) of each subject's last token.
    """

    def __init__(self, model: nn.Module, layout: Layout, statements: Sequence[Statement]) -> None:
        self._model, self._head = model, layout.head(model)
        device = home(model)
        self.ids_BT, self._mask_BT = pad([s.ids for s in statements], device)
        starts = torch.arange(len(statements), device=device) * self.ids_BT.shape[1]
        self.lasts_B = starts + torch.tensor([s.last for s in statements], device=device)
        places: list[int] = []
        rows: list[int] = []
        answers: list[int] = []
        for row, statement in enumerate(statements):
            stop = row * self.ids_BT.shape[1] + len(statement.ids)
            places += range(stop - len(statement.answer), stop)
            rows += [row] * len(statement.answer)
            answers += statement.answer
        self._places_N = torch.tensor(places, device=device)
        self._rows_N = torch.tensor(rows, device=device)
        self._answers_N = torch.tensor(answers, device=device)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run them; hooks decide what is read and changed on the way.

        Returns:
            The answers' probabilities (B,) float32 or wider, and whether each is the greedy one at
            all of its tokens (B,).
        """
        # Only what predicts an answer goes through the head.
        with changed_input(self._head, lambda h: take(h.flatten(0, -2), self._places_N)[None]):
            output = self._model(
                input_ids=self.ids_BT, attention_mask=self._mask_BT, use_cache=False
            )
        logits_NV = output.logits[0]
        wider = torch.promote_types(logits_NV.dtype, torch.float32)
        log_NV = logits_NV.to(wider).log_softmax(-1)
        log_N = log_NV.gather(1, self._answers_N[:, None])[:, 0]
        wrong_N = (log_NV.argmax(-1) != self._answers_N).to(wider)
        return self._mean(log_N).exp(), self._mean(wrong_N) == 0

    def _mean(self, values_N: torch.Tensor) -> torch.Tensor:
        """The mean over each row's answer."""
        zeros = values_N.new_zeros(len(self.ids_BT))
        sums_B = zeros.index_add(0, self._rows_N, values_N)
        return sums_B / zeros.index_add(0, self._rows_N, torch.ones_like(values_N))


def part_of(model: nn.Module, layout: Layout, part: Part, layer: int) -> nn.Module | None:
    """The module of a layer whose output is a part; None if this layer has no such part."""
    find = {
        "hidden": layout.layer,
        "ffn": layout.down_projection,
        "attention": layout.attention_projection,
    }[part]
    try:
        return find(model, layer)
    except ArchitectureError:
        return None


Site = tuple[Part, int]
"""A part of a layer."""


def sites_of(model: nn.Module, layout: Layout) -> dict[Site, nn.Module]:
    """All parts that a model's layers have, by part and layer."""
    found = {
        (part, layer): part_of(model, layout, part, layer)
        for part in PARTS
        for layer in range(layout.depth)
    }
    return {site: module for site, module in found.items() if module is not None}


@contextmanager
def noting(sites: Mapping[Site, nn.Module], places_B: torch.Tensor) -> Iterator[dict[Site, Any]]:
    """Note the outputs (B, D) of modules at places; they are in the mapping after the body."""
    noted: dict[Site, Any] = {}
    with ExitStack() as stack:
        seen = {site: stack.enter_context(captured_output(m)) for site, m in sites.items()}
        yield noted
    for site, output in seen.items():
        flat = output.tensor.flatten(0, -2)
        noted[site] = take(flat, places_B.to(flat.device))


@contextmanager
def putting(module: nn.Module, places_B: torch.Tensor, values_BD: torch.Tensor) -> Iterator[None]:
    """Within: the output of a module at places is replaced by values."""

    def change(output: torch.Tensor) -> torch.Tensor:
        flat = output.flatten(0, -2)
        here_B, values = places_B.to(output.device), values_BD.to(output.device, output.dtype)
        return flat.index_copy(0, here_B, values).view(output.shape)

    with changed_output(module, change):
        yield


@contextmanager
def adding(module: nn.Module, places_B: torch.Tensor, values_BD: torch.Tensor) -> Iterator[None]:
    """Within: values are added to the output of a module at places, in the wider dtype."""

    def change(output: torch.Tensor) -> torch.Tensor:
        wider = torch.promote_types(output.dtype, values_BD.dtype)
        here_B, values = places_B.to(output.device), values_BD.to(output.device, wider)
        flat = output.flatten(0, -2).to(wider)
        return flat.index_add(0, here_B, values).to(output.dtype).view(output.shape)

    with changed_output(module, change):
        yield
