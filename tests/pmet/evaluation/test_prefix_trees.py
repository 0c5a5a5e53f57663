"""Prefix trees: each token once, after the right predecessors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pmet.evaluation.prefix_trees import Pack, inputs, packed, reads_trees
from tests.conftest import load_golden

SEQUENCES = [(5, 1, 2), (5, 1, 3, 4), (5, 6), (7, 1), (5, 1, 2, 9, 9)]


def drawn(count: int, seed: int) -> list[tuple[int, ...]]:
    numbers = random.Random(seed)
    return [tuple(numbers.choices(range(3), k=numbers.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("most", [0, 4, 9, 100])
def test_every_sequence_is_in_one_pack_along_its_path(most: int) -> None:
    sequences = list(dict.fromkeys([*SEQUENCES, *drawn(40, most)]))
    packs = packed(sequences, most)
    held = [sequence for pack in packs for sequence, _ in pack.sequences]
    assert sorted(held) == sorted(sequences)
    for pack in packs:
        assert len(pack.ids) <= max(most, len(pack.sequences[0][0]))
        for sequence, path in pack.sequences:
            assert tuple(pack.ids[place] for place in path) == sequence
            assert [pack.paths[place] for place in path] == [
                path[: i + 1] for i in range(len(path))
            ]
        # No token is stored twice.
        assert len({tuple(pack.ids[i] for i in p) for p in pack.paths}) == len(pack.ids)
    assert [len(pack.ids) for pack in packs] == sorted(len(pack.ids) for pack in packs)
    if not most:
        assert all(len(pack.sequences) == 1 for pack in packs)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_a_model_reads_a_tree_as_it_reads_its_sequences(family: str) -> None:
    model = load_golden(family).model
    packs = packed(SEQUENCES, 8)
    assert len(packs) > 1
    with torch.no_grad():
        logits_BNV = model(**inputs(model, packs, trees=True)).logits
        for pack, logits_NV in zip(packs, logits_BNV, strict=True):
            for sequence, path in pack.sequences:
                alone_TV = model(torch.tensor([sequence])).logits[0]
                torch.testing.assert_close(logits_NV[list(path)], alone_TV, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "config", "longest", "reads"),
    [
        ("llama", {}, 99, True),
        ("mpt", {}, 9, False),
        ("falcon", {"alibi": True}, 9, False),
        ("mamba", {}, 9, False),
        ("mistral", {"sliding_window": 8}, 8, True),
        ("mistral", {"sliding_window": 8}, 9, False),
        ("mistral", {"sliding_window": None}, 9, True),
    ],
)
def test_who_reads_trees(kind: str, config: dict[str, Any], longest: int, reads: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    assert reads_trees(model, longest) is reads


def test_a_sequence_that_another_begins_with_adds_nothing() -> None:
    pack = Pack()
    for sequence in sorted(SEQUENCES):
        pack.add(sequence)
    assert len(pack.ids) == len({s[:i] for s in SEQUENCES for i in range(1, len(s) + 1)})
