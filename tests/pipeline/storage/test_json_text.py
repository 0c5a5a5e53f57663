"""Records are standard JSON, and every number in them survives a round trip."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.json_text import dumps, loads
from pipeline.storage.store import Store, json_bytes

KEYS = st.text() | st.sampled_from(["$numberDouble", "$$numberDouble", "numberDouble"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["NaN", "Infinity", "-Infinity", 5e-324, 1.7e308])
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=3), max_leaves=20
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, of the same types, with NaN equal to NaN."""
    if type(one) is not type(other):
        return False
    match one:
        case dict():
            return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
        case list():
            return len(one) == len(other) and all(map(same, one, other))
        case float():
            signs = math.copysign(1, one) == math.copysign(1, other)
            return (one == other and signs) or (math.isnan(one) and math.isnan(other))
        case _:
            return bool(one == other)


def refused(word: str) -> Any:
    raise AssertionError(f"{word} is not JSON")


@settings(max_examples=500, deadline=None)
@given(VALUES)
def test_every_value_comes_back_from_standard_json(value: Any) -> None:
    for indent in (None, 2):
        text = dumps(value, indent=indent)
        json.loads(text, parse_constant=refused)
        assert same(loads(text), value)


def test_the_words_for_what_json_cannot_say() -> None:
    value = {"nll": math.nan, "rows": [math.inf, -math.inf], "answer": "NaN"}
    assert dumps(value) == (
        '{"nll": {"$numberDouble": "NaN"}, "rows": [{"$numberDouble": "Infinity"}, '
        '{"$numberDouble": "-Infinity"}], "answer": "NaN"}'
    )


@pytest.mark.parametrize("text", ['{"$numberDouble": "1.5"}', '{"$numberDouble": 3}'])
def test_another_writers_mapping_stays_what_it_is(text: str) -> None:
    assert loads(text) == json.loads(text)


def test_records_of_older_releases_are_read() -> None:
    assert same(loads('{"nll": NaN, "most": -Infinity}'), {"nll": math.nan, "most": -math.inf})


def test_a_record_without_such_a_number_is_written_as_before() -> None:
    value = {"z": 1.5, "a": ["Zürich", None, 3]}
    expected = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    assert json_bytes(value) == expected.encode()


def test_a_store_gives_them_back() -> None:
    store = Store("memory://json-text")
    store.write_json("record.json", {"share": math.inf, "loss": math.nan})
    assert same(store.read_json("record.json"), {"share": math.inf, "loss": math.nan})
