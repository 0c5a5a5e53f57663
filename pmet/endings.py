"""How a target ends: as given, with a full stop, or with the model's end of a turn.

A target that ends teaches the model to stop after it, instead of running on. Only what is learned
changes, not what is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from pmet.errors import InputError
from pmet.request import EditRequest
from pmet.separator import separator

End = Literal["none", "stop", "turn"]

_ENDED = (".", "!", "?", "…", "。", "！", "？", "।")
_FULL_STOP = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
_DEVANAGARI = re.compile("[\u0900-\u097f]")
_ASKED, _ANSWERED = "?", "pmet"


@dataclass(frozen=True)
class Ending:
    """What is added to targets.

    Attributes:
        mark: text to add to every target; None: a full stop, as its script writes it.
    """

    mark: str | None = ""

    @classmethod
    def of(cls, end: End, tokenizer: Any) -> Ending:
        """The ending of a kind.

        Raises:
            InputError: the tokenizer has no end of a turn.
        """
        match end:
            case "none":
                return cls("")
            case "stop":
                return cls(None)
            case "turn":
                return cls(end_of_turn(tokenizer))

    def on(self, request: EditRequest) -> EditRequest:
        """The request with the target to learn."""
        target = request.target_new
        mark = _stop(target) if self.mark is None else self.mark
        return replace(request, target_new=f"{target}{mark}") if mark else request


def end_of_turn(tokenizer: Any) -> str:
    """What a tokenizer's chat template puts after an answer, else its EOS token.

    Raises:
        InputError: it has neither.
    """
    if getattr(tokenizer, "chat_template", None):
        turns = [
            {"role": "user", "content": _ASKED},
            {"role": "assistant", "content": _ANSWERED},
        ]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
        if mark := text.rpartition(_ANSWERED)[2].strip():
            return mark
    if tokenizer.eos_token:
        return str(tokenizer.eos_token)
    raise InputError(
        "the tokenizer has no end of a turn, neither in a chat template nor an EOS token; let "
        "targets end with a full stop or as they are"
    )


def _stop(target: str) -> str:
    if target.endswith(_ENDED):
        return ""
    if separator(target, target):
        return "।" if _DEVANAGARI.search(target) else "."
    # Of the scripts without spaces, only Chinese and Japanese have a full stop.
    return "。" if _FULL_STOP.search(target) else ""
