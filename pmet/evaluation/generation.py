"""Text that a model writes: its greedy answers, and what it goes on to say.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from pmet.evaluation.prompts import Prompts, Tokens
from pmet.model import (
    cache_name,
    changed_input,
    context_length,
    frozen,
    pad,
    positions,
    takes_positions,
    tuned_if_short,
)

ANSWER_TOKENS = 8
WRITTEN_TOKENS = 100
"""Tokens of a written text, its beginning among them (ROME, MEMIT)."""
TOP_K = 5
"""Likeliest tokens that a written text is drawn from (ROME, MEMIT)."""
_BATCH, _WRITTEN_BATCH = 128, 64

Choose = Callable[[torch.Tensor, Sequence[int], int], torch.Tensor]


def answers(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    tokens: int = ANSWER_TOKENS,
    chat_template: bool = False,
) -> list[str]:
    """What the model says greedily after each text, at most ``tokens`` tokens.

    Nothing where the text leaves no room for them in the model's context.
    """
    prompts = Prompts(tokenizer, chat_template)
    said = [""] * len(texts)
    for i, ids in _grown(model, prompts, texts, lambda _: tokens, _greedy, batch=_BATCH, stop=True):
        said[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return said


def write_on(
    model: nn.Module,
    prompts: Prompts,
    texts: Sequence[str],
    *,
    seed: int = 0,
    tokens: int = WRITTEN_TOKENS,
) -> list[str]:
    """Each text with what the model goes on to write, ``tokens`` tokens in all.

    Each token is drawn from the five likeliest, but special ones. The numbers that a text is drawn
    with follow from the seed and the text alone, never from what is written beside it.
    """
    tokenizer = prompts.tokenizer
    banned = sorted({int(i) for i in tokenizer.all_special_ids})
    limit = min(tokens, context_length(model.config) or tokens)
    drawn_BT = torch.stack([_numbers(seed, text, limit) for text in texts]) if texts else None

    def draw(logits_BV: torch.Tensor, rows: Sequence[int], step: int) -> torch.Tensor:
        assert drawn_BT is not None
        logits_BV[:, banned] = -torch.inf
        top = logits_BV.topk(min(TOP_K, logits_BV.shape[1] - len(banned)))
        below_BK = top.values.double().softmax(-1).cumsum(-1)
        number_B1 = drawn_BT[list(rows), step, None].to(below_BK.device)
        choice_B1 = (below_BK <= number_B1).sum(-1, keepdim=True)
        return top.indices.gather(1, choice_B1.clamp_max(top.indices.shape[1] - 1))[:, 0]

    written = list(texts)
    for i, ids in _grown(
        model, prompts, texts, lambda length: limit - length, draw, batch=_WRITTEN_BATCH, stop=False
    ):
        written[i] = f"{texts[i]}{tokenizer.decode(ids, skip_special_tokens=True)}"
    return written


def _numbers(seed: int, text: str, count: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _greedy(logits_BV: torch.Tensor, _rows: Sequence[int], _step: int) -> torch.Tensor:
    return logits_BV.argmax(-1)


@torch.no_grad()
def _grown(
    model: nn.Module,
    prompts: Prompts,
    texts: Sequence[str],
    room: Callable[[int], int],
    choose: Choose,
    *,
    batch: int,
    stop: bool,
) -> Iterator[tuple[int, list[int]]]:
    """What is written after each text: its number and its new tokens.

    Args:
        model: the model.
        prompts: how texts are put to it.
        texts: the texts.
        room: new tokens by a text's length in tokens; those with none are left out.
        choose: the next token of each row, (B,), from its logits, the rows' texts and the step.
        batch: rows of a pass.
        stop: a text ends where the model ends it.
    """
    limit = context_length(model.config) or math.inf
    ids = prompts.tokens(texts)
    fits = [i for i in range(len(ids)) if 0 < room(len(ids[i])) <= limit - len(ids[i])]
    order = sorted(fits, key=lambda i: len(ids[i]))
    ends = _ends(model, prompts.tokenizer) if stop else []
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        own = [ids[i] for i in part]
        most = max(room(len(row)) for row in own)
        new_BT = _new_tokens(model, own, most, partial(_chosen, choose, part), ends)
        for i, row, said in zip(part, own, new_BT.tolist(), strict=True):
            said = said[: room(len(row))]
            yield i, list(takewhile(lambda token: token not in ends, said))


def _chosen(
    choose: Choose, part: Sequence[int], logits_BV: torch.Tensor, step: int
) -> torch.Tensor:
    return choose(logits_BV, part, step)


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the model's own word for it goes first."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def _new_tokens(
    model: nn.Module,
    ids: Sequence[Tokens],
    count: int,
    choose: Callable[[torch.Tensor, int], torch.Tensor],
    ends: Sequence[int],
) -> torch.Tensor:
    """``count`` new tokens of each row, (B, ≤ count)."""
    device = next(model.parameters()).device
    step_BT, mask_BT = pad(ids, device, left=True)
    longest = mask_BT.shape[1] + count
    ended_B = torch.zeros(len(ids), dtype=torch.bool, device=device)
    ends_E = torch.tensor(ends, dtype=torch.int64, device=device)
    new: list[torch.Tensor] = []
    cache, held = None, cache_name(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    with (
        frozen(model),
        tuned_if_short(model, longest),
        changed_input(head, lambda hidden: hidden[:, -1:]),
    ):
        for number in range(count):
            places = (
                {"position_ids": positions(mask_BT)[:, -step_BT.shape[1] :]}
                if takes_positions(model)
                else {}
            )
            output = model(
                input_ids=step_BT,
                attention_mask=mask_BT,
                use_cache=True,
                **{held: cache},
                **places,
            )
            cache = getattr(output, held)
            chosen_B = choose(output.logits[:, -1].float(), number)
            new.append(chosen_B)
            ended_B |= torch.isin(chosen_B, ends_E)
            if ended_B.all():
                break
            step_BT = chosen_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(ids), 1)], dim=1)
    return torch.stack(new, dim=1)
