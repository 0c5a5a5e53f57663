"""Prompts as presented to a model: as plain text, or as a user turn of its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmet.errors import InputError
from pmet.model import beyond, encode_all
from pmet.request import separator

Tokens = tuple[int, ...]
Continuation = tuple[str, str]
"""A prompt and a possible continuation."""


@dataclass(frozen=True)
class Prompts:
    """Converts prompts and their continuations to tokens.

    Attributes:
        tokenizer: a fast tokenizer.
        chat: whether each prompt is a user turn of the tokenizer's chat template, and its
            continuation the answer; otherwise both are one text, with a space between them unless
            the prompt ends in white space.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    tokenizer: Any
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "the model's tokenizer has no chat template; leave chat_template out, or use a "
                "model that was trained for chat"
            )

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each prompt."""
        return encode_all(self.tokenizer, self._put(texts), special=not self.chat)

    def continuations(self, pairs: Sequence[Continuation]) -> list[tuple[Tokens, Tokens]]:
        """Tokens of each prompt, and of its target as its continuation, without a BOS token there.

        `pmet.model.tokenization.tokenize_continuation` defines which tokens belong to a target.

        Raises:
            RequestError: a target has no tokens.
        """
        texts = list(dict.fromkeys(text for text, _ in pairs))
        put = dict(zip(texts, self._put(texts), strict=True))
        ids = dict(zip(texts, self.tokens(texts), strict=True))
        spaces = {text: "" if self.chat else separator(text) for text in texts}
        wholes = [f"{put[text]}{spaces[text]}{target}" for text, target in pairs]
        whole_ids = encode_all(self.tokenizer, wholes, special=not self.chat)
        return [
            (ids[text], beyond(self.tokenizer, ids[text], whole, target, spaces[text]))
            for (text, target), whole in zip(pairs, whole_ids, strict=True)
        ]

    def _put(self, texts: Sequence[str]) -> list[str]:
        if not self.chat:
            return list(texts)
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
