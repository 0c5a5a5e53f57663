"""Prompts as they are put to a model: as plain text, or as a user's turn of its chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmet.errors import InputError
from pmet.model import beyond, encode_all
from pmet.request import separator

Tokens = tuple[int, ...]
Continuation = tuple[str, str]
"""A prompt and what may follow it."""


@dataclass(frozen=True)
class Prompts:
    """Turns prompts, and what may follow them, into tokens.

    Attributes:
        tokenizer: a fast tokenizer.
        chat: each prompt is a user's turn of the tokenizer's chat template, and what follows it is
            the answer; else both are one text, with a space between them unless white space ends
            the prompt.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    tokenizer: Any
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "the model's tokenizer has no chat template; leave chat_template out, or take a "
                "model that was made for chats"
            )

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each prompt."""
        return encode_all(self.tokenizer, self._put(texts), special=not self.chat)

    def continuations(self, pairs: Sequence[Continuation]) -> list[tuple[Tokens, Tokens]]:
        """Tokens of each prompt, and those of its target as it follows; never a BOS token there.

        Which tokens a target has, `pmet.model.tokenization.tokenize_continuation` says.

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
