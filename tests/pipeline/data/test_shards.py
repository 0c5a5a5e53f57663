import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.shards import Shard, plan_shards


def test_the_last_shard_may_be_short():
    assert plan_shards(600, 256) == [Shard(0, 0, 256), Shard(1, 256, 512), Shard(2, 512, 600)]


def test_a_shard_is_named_by_its_place_and_counts_its_rows():
    shard = Shard(index=7, start=10, stop=13)
    assert shard.name == "00007"
    assert len(shard) == 3


def test_no_rows_need_no_shard():
    assert plan_shards(0, 256) == []


@given(count=st.integers(0, 5000), shard_size=st.integers(1, 600))
def test_every_row_is_in_exactly_one_shard(count, shard_size):
    shards = plan_shards(count, shard_size)
    assert [row for s in shards for row in range(s.start, s.stop)] == list(range(count))
    assert [s.index for s in shards] == list(range(len(shards)))
    assert all(len(s) == shard_size for s in shards[:-1])
    assert all(0 < len(s) <= shard_size for s in shards)
    assert sorted(s.name for s in shards) == [s.name for s in shards]


@pytest.mark.parametrize(("count", "size"), [(-1, 1), (1, 0), (1, -3)])
def test_impossible_plans_are_refused(count, size):
    with pytest.raises(ValueError, match=f"cannot cut {count} rows into shards of {size}"):
        plan_shards(count, size)


def test_a_group_is_never_cut():
    groups = [0, 1, 1, 1, 4, 5, 5, 7]
    assert plan_shards(8, 2, groups) == [Shard(0, 0, 4), Shard(1, 4, 7), Shard(2, 7, 8)]


@given(sizes=st.lists(st.integers(1, 9), max_size=60), shard_size=st.integers(1, 12))
def test_groups_stay_whole_and_shards_grow_by_less_than_a_group(sizes, shard_size):
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    shards = plan_shards(len(groups), shard_size, groups)
    assert [row for s in shards for row in range(s.start, s.stop)] == list(range(len(groups)))
    assert all(len(s) < shard_size + max(sizes) for s in shards)
    assert all(len(s) >= shard_size for s in shards[:-1])
    assert all(groups[s.start - 1] != groups[s.start] for s in shards[1:])
    alone = list(range(len(groups)))
    assert plan_shards(len(groups), shard_size, alone) == plan_shards(len(groups), shard_size)
