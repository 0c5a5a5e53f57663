"""Strict JSON: like Python's parser, but duplicate keys are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmet.strict_json import RepeatedKeyError, parse_json, parse_records, repeated_key

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(VALUES)
def test_values_are_read_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": [0], "v_lr": 1, "layers": [0, 1]}', "key 'layers' is given twice; keep one"),
        ('[{"a": {"b": 1, "b": 1}}]', "key 'b' is given twice"),
        ('{"a": 1, "\\u0061": 1}', "key 'a' is given twice"),
        ('{"": 1, "": 1}', "key '' is given twice"),
    ],
)
def test_a_key_given_twice_is_named(text: str, message: str) -> None:
    with pytest.raises(RepeatedKeyError, match=message):
        parse_json(text)


def test_of_records_only_those_with_a_key_given_twice_are_marked() -> None:
    records = parse_records('[{"a": 1}, {"a": {"b": 1, "b": 2}}, {"a": [{"c": 0, "c": 0}]}, 1]')
    assert records == [{"a": 1}, {"a": {"b": 2}}, {"a": [{"c": 0}]}, 1]
    assert [repeated_key(record) for record in records] == [None, "b", "c", None]
