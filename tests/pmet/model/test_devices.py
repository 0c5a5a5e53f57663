"""Placement of modules on devices, and transfers between them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pmet.errors import ArchitectureError
from pmet.evaluation import generation, metrics
from pmet.evaluation.prompts import Prompts
from pmet.model import contexts
from pmet.model.architecture import resolve
from pmet.model.devices import home, share_out, shares
from pmet.targets.memory import room_beside
from pmet.update import second_moments
from tests import simulated
from tests.conftest import Golden

SIZES = st.lists(st.integers(1, 10), min_size=1, max_size=40)
ROOM = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


@given(SIZES, st.integers(0, 100), ROOM)
def test_devices_are_filled_in_the_order_of_the_layers(
    sizes: list[int], rest: int, room: list[float]
):
    owners = shares(sizes, rest, room)
    assert owners == sorted(owners)
    assert len(owners) == len(sizes)
    assert set(owners) <= set(range(len(room)))


@given(SIZES, st.integers(0, 100), ROOM)
def test_no_device_has_more_than_its_part_and_a_layer(
    sizes: list[int], rest: int, room: list[float]
):
    owners = shares(sizes, rest, room)
    layers = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == device)
        for device in range(len(room))
    ]
    whole, largest = rest + sum(sizes), max(sizes) + 1e-6
    at_home = max(0, whole * room[0] / sum(room) - rest)
    assert layers[0] <= at_home + largest
    for has, part in zip(layers[1:], room[1:], strict=True):
        assert has <= (sum(sizes) - at_home) * part / sum(room[1:]) + largest


def test_a_device_that_is_full_of_other_things_gets_no_layer():
    assert shares([1, 1, 1, 1], 10, [1, 1, 1]) == [1, 1, 2, 2]


def test_a_large_device_gets_more():
    assert shares([1] * 10, 2, [1, 2]) == [0] * 2 + [1] * 8


def test_a_simulated_device_refuses_what_is_on_another():
    """Otherwise no test that uses them would prove anything."""
    with simulated.devices(2) as (first, second):
        a, b = torch.ones(2, device=first), torch.ones(2, device=second)
        with pytest.raises(RuntimeError, match=r"lazy:0.*lazy:1"):
            a + b
        with pytest.raises(RuntimeError, match=r"cpu.*lazy:1"):
            b @ torch.ones(2)
        assert (a + b.to(first)).tolist() == [2, 2]


def test_what_has_been_changed_since_is_brought_again():
    with simulated.devices(2) as (first, second):
        model = share_out(_Stack(), [first, second])
        seen: list[Any] = []
        last = model.layers[1]
        last.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        given_to_all = torch.ones(1, 2, device=first)
        last(given_to_all)
        last(given_to_all)
        assert seen[0] is seen[1]
        given_to_all.add_(1)
        last(given_to_all)
        # A layer may change its inputs in place (Falcon does).
        seen[-1].add_(5)
        last(given_to_all)
        assert [x.tolist() for x in seen[2:]] == [[[7, 7]], [[2, 2]]]
        assert {x.device for x in seen} == {second}


def test_texts_are_written_and_read_and_moments_summed_as_on_one(golden: Golden):
    model, tokenizer, hparams = golden.model, golden.tokenizer, golden.hparams
    texts = [request.text for request in golden.requests[:3]]
    ends = [lambda _: 0, lambda _: 0, lambda _: None]

    def of(model: nn.Module) -> tuple[Any, ...]:
        return (
            # Context templates are written by the same generation, at length.
            contexts.generate(model, tokenizer, seed=3) if golden.family == "gpt2" else None,
            generation.write_on(model, Prompts(tokenizer), texts, seed=1, tokens=12),
            # Two of the rows leave the batch after a token.
            generation.say(model, tokenizer, Prompts(tokenizer).tokens(texts), tokens=9, ends=ends),
            metrics.score_texts(model, tokenizer, texts),
            second_moments.measure(model, tokenizer, texts, hparams).sums,
        )

    expected = of(model)
    with simulated.devices(2) as devices:
        found = of(share_out(deepcopy(model), devices))
        assert {sums.device for sums in found[4].values()} <= set(devices)
        moments = {layer: sums.cpu() for layer, sums in found[4].items()}
    assert found[:3] == expected[:3]
    for mine, reference in zip(found[3], expected[3], strict=True):
        assert mine.greedy == reference.greedy
        assert mine.nll == pytest.approx(reference.nll, rel=1e-6)
    for layer, sums in expected[4].items():
        torch.testing.assert_close(moments[layer], sums, rtol=1e-6, atol=1e-6)


def test_a_batch_may_take_what_the_fullest_device_leaves(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
):
    layout, z = resolve(golden.model, golden.hparams), golden.hparams.target_layer
    with simulated.devices(2) as (first, second):
        free = {first: 1000, second: 90}
        monkeypatch.setattr("pmet.targets.memory.free_memory", free.get)
        model = share_out(deepcopy(golden.model), [first, second])
        above = [layout.weight(model, i).device for i in range(z + 1, layout.depth)]
        part = above.count(second) / len(above)
        assert room_beside(model, layout, z) == int(90 / part)
        # With nothing above, tensors stay on their own device.
        assert room_beside(model, layout, layout.depth - 1) == free[home(model)]


def test_a_model_without_a_list_of_layers_is_refused(golden: Golden):
    model = deepcopy(golden.model)
    model.config.num_hidden_layers = 77
    with pytest.raises(ArchitectureError, match=r"77 layers.*one GPU"):
        share_out(model, [torch.device("cpu")] * 2)


class _Config:
    num_hidden_layers = 2

    def get_text_config(self) -> _Config:
        return self


class _Stack(nn.Module):
    """Two layers, in a list, behind embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.config = _Config()
        self.embeddings = nn.Linear(2, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings
