"""Keys and values of texts that a model will continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmet.errors import ArchitectureError
from pmet.evaluation import caches
from pmet.evaluation.generation import say
from pmet.model import cache_name
from pmet.model.tokenization import pad
from tests.conftest import Golden

LONG = tuple(range(20, 90))
TEXTS = [(3, 5, 8, 2), LONG, (3, 5), (6,), (3, 5, 8, 2), (7, 1, 4), (3, 5, 9)]


@torch.no_grad()
def continued(model: Any, texts: list[tuple[int, ...]], steps: list[int]) -> list[torch.Tensor]:
    """Logits after texts and after each of a few more tokens, from one cache, (B, V) each."""
    cache, logits_BV = caches.read(model, texts, len(steps))
    _, mask_BT = pad(texts, torch.device("cpu"), left=True)
    found = [logits_BV]
    for token in steps:
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(texts), 1)], dim=1)
        output = model(
            input_ids=torch.full((len(texts), 1), token),
            attention_mask=mask_BT,
            position_ids=(mask_BT.sum(1, keepdim=True) - 1),
            use_cache=True,
            **{cache_name(model): cache},
        )
        found.append(output.logits[:, -1])
    return found


@torch.no_grad()
def alone(model: Any, text: tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


def test_texts_go_on_as_if_each_had_been_read_alone(golden: Golden) -> None:
    steps = [4, 11, 2]
    found = continued(golden.model, TEXTS, steps)
    for number, logits_BV in enumerate(found):
        for row, text in enumerate(TEXTS):
            expected = alone(golden.model, (*text, *steps[:number]))
            torch.testing.assert_close(logits_BV[row], expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.integers(3, 6), min_size=1, max_size=9).map(tuple), min_size=1, max_size=7
    )
)
def test_any_texts_do(golden: Golden, texts: list[tuple[int, ...]]) -> None:
    for logits_BV, more in zip(continued(golden.model, texts, [5]), ((), (5,)), strict=True):
        for row, text in enumerate(texts):
            expected = alone(golden.model, (*text, *more))
            torch.testing.assert_close(logits_BV[row], expected, atol=2e-5, rtol=1e-5)


@contextmanager
def tokens_read(model: Any) -> Iterator[list[int]]:
    """Counts the tokens of each pass, padding included."""
    counts: list[int] = []

    def count(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        counts.append(named["input_ids"].numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def test_a_long_text_does_not_make_short_ones_longer(golden: Golden) -> None:
    short = [(number, 5, 8, 2) for number in range(10, 60)]
    say(golden.model, golden.tokenizer, [*short, LONG], tokens=1)  # tries the model's miniature
    with tokens_read(golden.model) as counts:
        say(golden.model, golden.tokenizer, [*short, LONG], tokens=1)
    assert sum(counts) <= 1.5 * (len(LONG) + sum(map(len, short)))


def test_rows_leave_with_their_room(golden: Golden) -> None:
    cache, _ = caches.read(golden.model, TEXTS, 2)
    layer = cache.layers[0]
    kept = torch.tensor([0, 3])
    keys, values = layer.keys[kept], layer.values[kept]
    layer.batch_select_indices(kept)
    more = keys[:, :, :1] + 1
    held, _ = layer.update(more, more)
    assert torch.equal(held, torch.cat([keys, more], dim=2))
    assert torch.equal(layer.values, torch.cat([values, more], dim=2))
    assert layer.get_seq_length() == len(LONG) + 1


def test_another_kind_of_cache_is_refused(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    class Window(caches.DynamicLayer):
        """Keeps the last tokens only, as some layers do."""

    monkeypatch.setattr(caches, "DynamicLayer", Window)
    with pytest.raises(ArchitectureError, match="other layers"):
        caches.read(golden.model, TEXTS, 2)
