"""Requests that make a computation fail are isolated, and no others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shards import plan_shards
from pipeline.errors import WorkerError
from pipeline.failures import Failure
from pipeline.stages.isolation import Piece, isolate, most_isolated


class Machine:
    """Computes pieces, and fails on those that contain a poisonous request."""

    def __init__(self, poison: set[int]) -> None:
        self.poison = poison
        self.computed: list[int] = []
        self.aside: dict[int, str] = {}
        self.failures = 0
        self.rounds: list[int] = []

    def compute(self, pieces: Sequence[Piece]) -> dict[Piece, Failure]:
        self.rounds.append(len(pieces))
        failed = {
            p: Failure(f"died of {min(self.poison & {*p.places})}") for p in pieces if self.bad(p)
        }
        self.computed += [place for p in pieces if p not in failed for place in p.places]
        self.failures += sum(p.attempts for p in failed)
        return failed

    def bad(self, piece: Piece) -> bool:
        return bool(self.poison & {*piece.places})

    def set_aside(self, piece: Piece, failure: Failure) -> None:
        (place,) = piece.places
        self.aside[place] = failure.text


def run(poison: set[int], count: int, size: int, limit: int) -> Machine:
    machine = Machine(poison)
    pieces = [Piece((s,), tuple(range(s.start, s.stop))) for s in plan_shards(count, size)]
    failed = machine.compute(pieces)
    isolate(failed, machine.compute, machine.set_aside, limit)
    return machine


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.sets(st.integers(0, 199), max_size=6))
def test_poisonous_requests_are_isolated_and_all_others_computed_once(
    count: int, size: int, poison: set[int]
) -> None:
    poison = {place for place in poison if place < count}
    machine = run(poison, count, size, limit=len(poison))
    assert machine.aside == {place: f"died of {place}" for place in poison}
    assert Counter(machine.computed) == Counter(set(range(count)) - poison)
    levels = math.ceil(math.log2(size)) + 1
    assert machine.failures <= len(poison) * (2 * levels + 3)


def test_a_fault_of_all_requests_stops_early_and_isolates_none() -> None:
    machine = Machine(set(range(4096)))
    pieces = [Piece((s,), tuple(range(s.start, s.stop))) for s in plan_shards(4096, 2048)]
    with pytest.raises(WorkerError) as error:
        isolate(machine.compute(pieces), machine.compute, machine.set_aside, limit=5)
    assert str(error.value).startswith(
        "at least 8 requests fail repeatedly, of which 5 may be set aside; so many suggest "
        "a fault of the job or of its machines: shard 00000 (512 requests, 0 to 511): died of 0; "
    )
    assert str(error.value).endswith("remove the cause and run the same job again")
    assert machine.rounds == [2, 4, 8]
    assert machine.aside == {}


def test_how_many_may_be_isolated() -> None:
    counts = (1, 2, 9, 10, 500, 700, 100_000)
    assert [most_isolated(count) for count in counts] == [0, 1, 4, 5, 5, 7, 1000]


def test_pieces_are_named() -> None:
    (shard,) = plan_shards(8, 8)
    whole = Piece((shard,), tuple(range(8)))
    assert str(whole) == "shard 00000 (requests 0 to 7)"
    half = whole.halves()[1]
    assert str(half) == "shard 00000 (4 requests, 4 to 7)"
    assert str(half.halves()[0].halves()[0]) == "shard 00000 (request 4)"
    several = Piece(tuple(plan_shards(24, 8)), (1, 9, 20))
    assert str(several) == "shards 00000-00002 (3 requests, 1 to 20)"
    assert str(several.halves()[1]) == "shards 00001-00002 (2 requests, 9 to 20)"


def test_a_group_is_cut_only_where_there_is_nothing_else() -> None:
    (shard,) = plan_shards(6, 6)
    whole = Piece((shard,), tuple(range(6)), (0, 0, 0, 0, 4, 5))
    left, right = whole.halves()
    assert (left.places, right.places) == ((0, 1, 2, 3), (4, 5))
    assert [half.places for half in left.halves()] == [(0, 1), (2, 3)]
    assert [half.groups for half in right.halves()] == [(4,), (5,)]
