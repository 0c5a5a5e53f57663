"""What a worker does for lm-evaluation-harness: it answers requests with its model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
Answer = Any
"""As the library has it: log-likelihood and whether it is greedy, log-likelihood, or text."""

LARGEST_PART = 256
"""Requests sent to a worker together, at most."""
_LARGEST_LENGTH = 65_536  # characters of their texts, of which generated ones count four a token
_ON_CPU, _ON_GPU = 8, 32
_SEED = 1234


@dataclass(frozen=True)
class Part:
    """Requests of one kind that are answered together.

    Attributes:
        kind: the library's name of the kind.
        arguments: of each request: texts, and the settings of generated text.
        batch_size: sequences read side by side; None: by the device.
    """

    kind: Kind
    arguments: tuple[tuple[Any, ...], ...]
    batch_size: int | None


def parts_of(
    kind: Kind, arguments: Sequence[tuple[Any, ...]], batch_size: int | None
) -> list[Part]:
    """Cut requests into parts, in their order: those of one document share their beginning.

    What is answered together depends only on the job, never on the number of workers.
    """
    return [Part(kind, tuple(own), batch_size) for own in _runs(arguments)]


def _runs(arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    own: list[tuple[Any, ...]] = []
    length = 0
    for each in arguments:
        more = sum(map(_length, each))
        if own and (len(own) == LARGEST_PART or length + more > _LARGEST_LENGTH):
            yield own
            own, length = [], 0
        own.append(each)
        length += more
    if own:
        yield own


def _length(argument: Any) -> int:
    if isinstance(argument, dict):
        return 4 * most_generated(argument)
    return len(str(argument))


def most_generated(settings: dict[str, Any]) -> int:
    """The number of tokens that a request generates at most."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return next((int(settings[name]) for name in names if settings.get(name)), 256)


def answer(model: Any, tokenizer: Any, part: Part) -> list[Answer]:
    """Answer the requests of a part with an open model, through the library's own model class."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    size = part.batch_size or (_ON_GPU if gpus else _ON_CPU)
    # The library sets the tokenizer's padding; other measurements go on with ours.
    asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=size)
    requests = [
        # It changes the settings that it is given.
        Instance(part.kind, {}, copy.deepcopy(arguments), i)
        for i, arguments in enumerate(part.arguments)
    ]
    with torch.random.fork_rng(gpus), torch.no_grad():
        # For tasks that draw their text at random.
        torch.manual_seed(_SEED)
        return list(getattr(asked, part.kind)(requests, disable_tqdm=True))
