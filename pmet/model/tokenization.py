"""Tokenization: where the subject ends, which tokens belong to the target, and padding.

Positions come from the character offsets of the whole text as the model reads it, never from
separately tokenised pieces, which gain BOS tokens and lose merges at their seams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pmet.errors import InputError, RequestError
from pmet.request import EditRequest
from pmet.separator import SPACE, separator

Item = TypeVar("Item")

KL_PROMPT = "{} is a"
"""Prompt on which the model must not drift (from ROME, used in PMET's KL term)."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's tokens, and the index of the subject's last one among them."""

    ids: tuple[int, ...]
    subject_last: int

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens before the subject's last one."""
        return self.ids[: self.subject_last]

    @property
    def suffix(self) -> tuple[int, ...]:
        """The subject's last token and all tokens after it."""
        return self.ids[self.subject_last :]


def tokenize_prompt(tokenizer: Any, request: EditRequest, template: str = "{}") -> TokenizedPrompt:
    """Tokenize a request's prompt inside a context template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        request: the edit request.
        template: text with one ``{}``, the place of the filled-in prompt.

    Raises:
        InputError: the tokenizer gives no character offsets.
        RequestError: no token covers the subject.
    """
    shift = template.index("{}")
    start, stop = request.subject_span
    return _tokenize(tokenizer, template.replace("{}", request.text), (shift + start, shift + stop))


def subject_first(tokenizer: Any, request: EditRequest) -> int:
    """The index of the subject's first token in a request's prompt, see `tokenize_prompt`."""
    return _covering(_with_offsets(tokenizer, request.text)[1], request.text, request.subject_span)[
        0
    ]


def tokenize_kl_prompt(tokenizer: Any, request: EditRequest) -> TokenizedPrompt:
    """Tokenize ``"{subject} is a"``."""
    return _tokenize(tokenizer, KL_PROMPT.replace("{}", request.subject), (0, len(request.subject)))


def tokenize_target(tokenizer: Any, request: EditRequest, target: str) -> tuple[int, ...]:
    """Tokens of ``target`` as a continuation of the request's prompt.

    Raises:
        RequestError: the target has no tokens.
    """
    return tokenize_continuation(tokenizer, request.text, target, request.separator)


def tokenize_continuation(
    tokenizer: Any, text: str, target: str, space: str | None = None
) -> tuple[int, ...]:
    """Tokens of ``target`` as a continuation of ``text``; never a BOS token.

    ``space`` separates them; None: as their script is written. The target's tokens are those that
    the whole text has beyond the prompt's, the separator's included. Only if the tokenizer merges
    across the seam is the target tokenised separately.
    """
    if space is None:
        space = separator(text, target)
    whole = encode(tokenizer, f"{text}{space}{target}")
    return beyond(tokenizer, encode(tokenizer, text), whole, target, space)


def beyond(
    tokenizer: Any,
    prompt_ids: tuple[int, ...],
    whole_ids: tuple[int, ...],
    target: str,
    space: str = SPACE,
) -> tuple[int, ...]:
    """Tokens of ``target`` in a text, as in ``tokenize_continuation``, from the text's tokens.

    Raises:
        RequestError: the target has no tokens.
    """
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        target_ids = whole_ids[len(prompt_ids) :]
    else:
        target_ids = _alone(tokenizer, f"{space}{target}")
    if not target_ids:
        raise RequestError(f"target {target!r} has no tokens in this vocabulary; reword it")
    return target_ids


def _alone(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens of a continuation without its prompt, and without a space that it does not have."""
    found = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if text[:1].isspace():
        return found
    # SentencePiece puts a space in front of every text: here a line break takes it.
    breaking, whole = (
        tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
        for before in ("\n", f"\n{text}")
    )
    follows = breaking and whole[: len(breaking)] == breaking
    return whole[len(breaking) :] if follows else found


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens of a text as the model reads it: special tokens in front, none at the end."""
    return _with_offsets(tokenizer, text)[0]


def encode_all(
    tokenizer: Any, texts: Sequence[str], *, special: bool = True
) -> list[tuple[int, ...]]:
    """Tokens of many texts, in a quarter of the time that separate calls of ``encode`` take.

    Args:
        tokenizer: a fast tokenizer.
        texts: the texts.
        special: put special tokens in front; without them, the text is tokenised as it is.
    """
    if not texts:
        return []
    _refuse_slow(tokenizer)
    # Resets state that an earlier caller may have changed: truncation, padding, special tokens.
    tokenizer("")
    # Wrapping the result as transformers does takes longer than tokenising.
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=special)
    return [tuple(e.ids[: _end(e.special_tokens_mask)] if special else e.ids) for e in encoded]


def _tokenize(tokenizer: Any, text: str, subject: tuple[int, int]) -> TokenizedPrompt:
    ids, offsets = _with_offsets(tokenizer, text)
    # The last one: several tokens may share a multi-byte character; its last byte counts.
    return TokenizedPrompt(ids, _covering(offsets, text, subject)[-1])


def _covering(offsets: Sequence[tuple[int, int]], text: str, subject: tuple[int, int]) -> list[int]:
    """Indices of the tokens that cover the subject."""
    start, stop = subject
    covering = [i for i, (a, b) in enumerate(offsets) if a < b and a < stop and b > start]
    if not covering:
        raise RequestError(
            f"no token covers the subject {text[start:stop]!r}; the tokenizer drops it, reword it"
        )
    return covering


def _with_offsets(tokenizer: Any, text: str) -> tuple[tuple[int, ...], Sequence[tuple[int, int]]]:
    _refuse_slow(tokenizer)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    end = _end(encoded["special_tokens_mask"])
    return tuple(encoded["input_ids"][:end]), encoded["offset_mapping"][:end]


def _end(special_tokens_mask: Sequence[int]) -> int:
    """The end of a text, before any appended EOS: that would end it before the target."""
    end = len(special_tokens_mask)
    while end and special_tokens_mask[end - 1]:
        end -= 1
    return end


def _refuse_slow(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; load the model's fast "
            "tokenizer (a folder with tokenizer.json)"
        )


def context_length(config: Any) -> int | None:
    """The maximum number of tokens for the model's positions, if its configuration gives it."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (1: token, 0: padding), both (rows, longest) int64.

    Padding is token 0, which every vocabulary has; the mask hides it.
    """
    longest = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        padding = [0] * (longest - len(sequence))
        tokens, ones = list(sequence), [1] * len(sequence)
        ids.append(padding + tokens if left else tokens + padding)
        mask.append(padding + ones if left else ones + padding)
    shape = (len(sequences), longest)
    return (
        torch.tensor(ids, dtype=torch.int64, device=device).reshape(shape),
        torch.tensor(mask, dtype=torch.int64, device=device).reshape(shape),
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of every token in its own row; padding in front has none and gets 0."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def batches_by_tokens(
    items: Sequence[Item], budget: int, length: Callable[[Item], int]
) -> Iterator[Sequence[Item]]:
    """Split ``items``, ascending in length, into batches of at most ``budget`` padded tokens.

    An item longer than the budget is a batch of its own.
    """
    start = 0
    for stop in range(1, len(items) + 1):
        if stop == len(items) or (stop + 1 - start) * length(items[stop]) > budget:
            yield items[start:stop]
            start = stop
