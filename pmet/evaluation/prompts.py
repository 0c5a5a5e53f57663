"""Prompts as presented to a model: as plain text, or as a user turn of its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmet.errors import InputError
from pmet.model import beyond, contexts, encode_all
from pmet.separator import separator

Tokens = tuple[int, ...]
Continuation = tuple[str, str] | tuple[str, str, str]
"""A prompt, a possible continuation and, unless it follows from the script, their separator."""


@dataclass(frozen=True)
class Prompts:
    """Converts prompts and their continuations to tokens.

    Attributes:
        tokenizer: a fast tokenizer.
        chat: whether each prompt is a user turn of the tokenizer's chat template, and its
            continuation the answer; otherwise both are one text, with a separator between them.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    tokenizer: Any
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not self.has_chat:
            raise InputError(
                "the model's tokenizer has no chat template; leave chat_template out, or use a "
                "model that was trained for chat"
            )

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return contexts.has_chat_template(self.tokenizer)

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each prompt."""
        return encode_all(self.tokenizer, self._put(texts), special=not self.chat)

    def continuations(self, pairs: Sequence[Continuation]) -> list[tuple[Tokens, Tokens]]:
        """Tokens of each prompt, and of its target as its continuation, without a BOS token there.

        `pmet.model.tokenization.tokenize_continuation` defines which tokens belong to a target.

        Raises:
            RequestError: a target has no tokens.
        """
        texts = list(dict.fromkeys(pair[0] for pair in pairs))
        put = dict(zip(texts, self._put(texts), strict=True))
        ids = dict(zip(texts, self.tokens(texts), strict=True))
        spaces = [self._between(*pair) for pair in pairs]
        wholes = [f"{put[p[0]]}{space}{p[1]}" for p, space in zip(pairs, spaces, strict=True)]
        whole_ids = encode_all(self.tokenizer, wholes, special=not self.chat)
        return [
            (ids[text], beyond(self.tokenizer, ids[text], whole, target, space))
            for (text, target, *_), whole, space in zip(pairs, whole_ids, spaces, strict=True)
        ]

    def _between(self, text: str, target: str, given: str | None = None) -> str:
        if self.chat:
            return ""
        return separator(text, target) if given is None else given

    def _put(self, texts: Sequence[str]) -> list[str]:
        if not self.chat:
            return list(texts)
        return [contexts.as_turn(self.tokenizer, text) for text in texts]
