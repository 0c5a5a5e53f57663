"""Names of entities, looked up in batches."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.facts.wikidata.labels import SCHEMA, Names, Wanted

NUMBERS = st.integers(-9, 9).filter(bool)
BATCHES = st.lists(
    st.lists(st.tuples(NUMBERS, st.text("aé中", max_size=3)), max_size=6), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(batches=BATCHES, asked=st.lists(NUMBERS | st.none(), max_size=8))
def test_the_last_label_of_each_entity_is_its_name(
    batches: list[list[tuple[int, str]]], asked: list[int | None]
) -> None:
    wanted = Wanted()
    for start in range(0, len(asked), 3):
        wanted.add(pa.chunked_array([pa.array(asked[start : start + 3], pa.int64())]))
    known: dict[int | None, str] = {}
    with Names(wanted.sorted()) as names:
        for batch in batches:
            names.add([pa.table([list(c) for c in zip(*batch, strict=True)] or [[], []], SCHEMA)])
            for number, label in batch:
                known[number] = label
        assert names.of(pa.array(asked, pa.int64())).to_pylist() == [known.get(n) for n in asked]
    assert np.array_equal(wanted.sorted(), sorted({n for n in asked if n is not None}))
