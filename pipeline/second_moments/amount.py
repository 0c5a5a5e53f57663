"""How much text second moments need: at least a token per dimension of a key, better several.

C is a sum of one k kᵀ per token, so its rank is at most the number of tokens. The request form of
the solve needs C to be positive definite, the key form only KᵀK + λC (`pmet.update.solver`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.data import Corpus, read_corpus
from pipeline.errors import JobError
from pmet.errors import NotPositiveDefiniteError
from pmet.model import Layout
from pmet.update import TOKENS_PER_DIMENSION, Factor, cheaper_form, moment_factor

WARNED, ENOUGH = TOKENS_PER_DIMENSION, 10
"""Tokens per dimension: the smallest and the largest number that sufficed in arXiv 2506.04226."""
DEFAULT = 20
"""Tokens per dimension that are read unless a number is given: see docs/statistics.md."""


def factors_second_moments(layout: Layout, requests: int) -> bool:
    """Whether the update of so many requests factors C itself, as far as it has no factor yet.

    With experts it never does: factors of C_i would serve only the experts that get facts.
    """
    if layout.experts:
        return False
    widths = (layout.key_width, layout.value_width)
    return cheaper_form(requests, *widths, factored=False) == "requests"


def read_enough(
    patterns: Sequence[str],
    tokenizer: Any,
    layout: Layout,
    *,
    max_length: int,
    tokens: int | None,
) -> Corpus:
    """Read a corpus for second moments.

    Args:
        patterns: Parquet files, globs or folders.
        tokenizer: the model's, a fast one.
        layout: the model's layout.
        max_length: the number of tokens that each text is truncated to.
        tokens: the number of tokens wanted, from the first text on; None: ``DEFAULT`` per dimension
            of a key (with experts, for each of them), spread over the corpus.

    Raises:
        InputError: as for `read_corpus`.
    """
    enough = _tokens_for(DEFAULT * layout.key_width, layout)
    return _read(patterns, tokenizer, enough, max_length=max_length, tokens=tokens)


def read_again(
    patterns: Sequence[str],
    tokenizer: Any,
    key_width: int,
    *,
    max_length: int,
    tokens: int | None,
) -> Corpus:
    """Read what `read_enough` read for a model without experts, given the width of its keys."""
    return _read(patterns, tokenizer, DEFAULT * key_width, max_length=max_length, tokens=tokens)


def _read(
    patterns: Sequence[str], tokenizer: Any, enough: int, *, max_length: int, tokens: int | None
) -> Corpus:
    return read_corpus(
        patterns,
        tokenizer,
        max_length=max_length,
        budget=enough if tokens is None else tokens,
        spread=tokens is None,
    )


def refuse_too_few(tokens: int, layout: Layout, requests: int | None, *, more: str = "") -> None:
    """Refuse a corpus that cannot give what the update needs.

    Args:
        tokens: its number of tokens.
        layout: the model's layout.
        requests: number of requests to edit; None: C itself must be positive definite.
        more: how to count more tokens of the same corpus, if there are more.

    Raises:
        JobError: the corpus is too small, however it continues.
    """
    width, each = layout.key_width, _seen(tokens, layout)
    alone = requests is None or layout.experts or factors_second_moments(layout, requests)
    if each + (0 if alone else requests or 0) < width:
        keys = "the keys are"
        if layout.experts:
            keys = f"each of {layout.experts} experts sees about {each:,} of them, and its keys are"
        raise JobError(
            f"corpus: it has {tokens:,} tokens, too few for second moments: {keys} {width:,} wide, "
            f"so at least {_tokens_for(width, layout):,} tokens are needed, and "
            f"{_enough(layout)} are enough; {more}give more text"
        )


def few(tokens: int, layout: Layout) -> str | None:
    """A warning about a corpus that is small for the model's keys, or None."""
    width, each = layout.key_width, _seen(tokens, layout)
    if each >= WARNED * width:
        return None
    shared = (
        f", of which each of {layout.experts} experts sees about {each:,},"
        if layout.experts
        else ""
    )
    return (
        f"corpus: it has only {tokens:,} tokens{shared} for keys that are {width:,} wide, so the "
        "second moments are imprecise, and the edit may damage what the model knows; "
        f"{_enough(layout)} tokens are enough"
    )


def _seen(tokens: int, layout: Layout) -> int:
    """How many of the tokens have a key: with experts, those that each of them sees, on average."""
    if (stacked := layout.family.stacked) is None:
        return tokens
    return tokens * stacked.per_token // layout.experts


def _tokens_for(each: int, layout: Layout) -> int:
    """The tokens of which each expert sees so many, if they are routed evenly."""
    if (stacked := layout.family.stacked) is None:
        return each
    return -(-each * layout.experts // stacked.per_token)


def _enough(layout: Layout) -> str:
    low, high = (_tokens_for(share * layout.key_width, layout) for share in (WARNED, ENOUGH))
    return f"{low:,} to {high:,}"


def checked_factor(where: str, module: str, moment_KK: torch.Tensor) -> Factor:
    """The Cholesky factor of a second moment.

    Args:
        where: where it is, or what it is computed from, for messages.
        module: the module whose inputs it describes.
        moment_KK: C, float32 as it is stored.

    Raises:
        JobError: it has none.
    """
    try:
        return moment_factor(moment_KK)
    except NotPositiveDefiniteError as error:
        width = len(moment_KK)
        raise JobError(
            f"second_moments: {module} of {where} cannot be used: {str(error).partition(',')[0]}. "
            f"It was computed from too little or too uniform text: use at least {WARNED * width:,} "
            f"tokens, better {ENOUGH * width:,}, of varied text"
        ) from None
