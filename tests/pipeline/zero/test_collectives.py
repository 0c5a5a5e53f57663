"""A process without a group is its only rank, for which collectives change nothing."""

import torch
import torch.distributed as dist

from pipeline.zero.collectives import (
    add_up,
    added,
    all_rows,
    in_lockstep,
    reduced_to_rows,
    rows_in_turn,
)


def test_a_process_without_a_group_is_the_only_rank() -> None:
    assert not dist.is_initialized()
    rows = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    before = rows.clone()
    assert added(3) == 3.0
    add_up(rows)
    (turn,) = rows_in_turn(rows)
    assert torch.equal(turn, before)
    assert torch.equal(all_rows(rows), before)
    assert torch.equal(reduced_to_rows(rows), before)
    assert list(in_lockstep(["a", "b"], "filler")) == [("a", True), ("b", True)]
