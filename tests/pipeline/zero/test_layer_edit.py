"""A layer's Δ on top of what earlier solves have saved of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.zero.layer_edit import Block, LayerReport, Solved, on_top
from pmet import Edit

WEIGHT = "layers.0.experts.down_proj"


def saved(delta: torch.Tensor, folder: Path) -> tuple[Path, LayerReport]:
    Edit({WEIGHT: delta}, {WEIGHT: torch.zeros(delta.shape)}).save(folder / "edit")
    report = LayerReport(
        parameter=WEIGHT,
        file="edit",
        sha256="",
        delta_norm=1.0,
        weight_norm=1.0,
        requests=1,
        solves=1,
        form="keys",
        weight=1.0,
        jitter=0.0,
        rounding=0.0,
        largest=1.0,
        dtype="float32",
    )
    return folder / "edit", report


def put_together(shape: torch.Size, blocks: Iterator[Block]) -> torch.Tensor:
    whole = torch.zeros(shape, dtype=torch.float64).flatten(0, -2)
    for block, top, left in blocks:
        whole[top : top + len(block), left : left + block.shape[1]] += block
    return whole.view(shape)


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_each_part_is_added_to_its_place_of_the_saved_edit(by: str, tmp_path: Path) -> None:
    earlier, delta = torch.randn(2, 6, 8, dtype=torch.float64)
    path, held = saved(earlier, tmp_path)
    if by == "rows":
        blocks = [Block(delta[:2], 0, 0), Block(delta[2:], 2, 0)]
    else:
        blocks = [Block(delta[:, :5], 0, 0), Block(delta[:, 5:], 0, 5)]
    total = on_top(Solved(iter(blocks), 1, "keys", 1.0, [0.0]), path, delta.shape, held)
    assert torch.equal(put_together(delta.shape, total.blocks), earlier + delta)


def test_experts_that_requests_are_no_longer_routed_to_keep_their_edit(tmp_path: Path) -> None:
    earlier = torch.randn(4, 6, 8, dtype=torch.float64)
    earlier[3] = 0
    path, held = saved(earlier, tmp_path)
    delta = torch.randn(6, 8, dtype=torch.float64)
    solved = Solved(iter([Block(delta, 6, 0)]), 1, "keys", 1.0, [0.0], partial=True)
    total = list(on_top(solved, path, earlier.shape, held).blocks)
    # The untouched one takes no part.
    assert [block.top for block in total] == [6, 0, 12]
    expected = earlier.clone()
    expected[1] += delta
    assert torch.equal(put_together(earlier.shape, iter(total)), expected)
