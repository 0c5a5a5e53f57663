"""Folders whose names become columns."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.hive import expand_with_columns
from pipeline.storage.store import Store, expand

FILES = (
    "a.parquet",
    "relation=capital/x.parquet",
    "relation=capital/day=1/y.parquet",
    "relation=__HIVE_DEFAULT_PARTITION__/z.parquet",
    "rejected/r.parquet",
    "relation=capital/_temporary/t.parquet",
    "_delta=1/d.parquet",
    "name=b.parquet",
)


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = Store(tmp_path if request.param == "disk" else f"memory://{uuid.uuid4().hex}")
    for name in FILES:
        store.write_bytes(f"f/{name}", b"x")
    return store


def test_a_folder_stands_for_its_partitions_as_well_and_for_no_other_folder(store: Store) -> None:
    found = {
        url.removeprefix(f"{store.join('f')}/"): c
        for url, c in expand_with_columns(store.join("f")).items()
    }
    assert found == {
        "a.parquet": {},
        "name=b.parquet": {},
        "relation=__HIVE_DEFAULT_PARTITION__/z.parquet": {"relation": None},
        "relation=capital/day=1/y.parquet": {"relation": "capital", "day": "1"},
        "relation=capital/x.parquet": {"relation": "capital"},
    }
    assert expand(store.join("f")) == [store.join("f", name) for name in sorted(found)]


def test_what_a_pattern_spells_out_is_no_column(store: Store) -> None:
    one = expand_with_columns(store.join("f/relation=capital"))
    assert list(one.values()) == [{"day": "1"}, {}]
    every = expand_with_columns(store.join("f/relation=*/x.parquet"))
    assert list(every.values()) == [{"relation": "capital"}]


@given(value=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1))
def test_values_come_back_from_the_names_that_spark_gives_them(value: str) -> None:
    from urllib.parse import quote

    store = Store(f"memory://{uuid.uuid4().hex}")
    store.write_bytes(f"f/of={quote(value, safe='')}/x.parquet", b"x")
    assert list(expand_with_columns(store.join("f")).values()) == [{"of": value}]
