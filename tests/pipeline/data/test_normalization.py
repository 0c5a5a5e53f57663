"""The normal form of a text and of a column."""

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.normalization import _ODD, normal, normal_column

SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]
TEXTS = st.text(
    st.one_of(
        st.sampled_from([*SPACES, *"aéß漢한ﬁ²", "\u0308", "\u0301", "\u1100", "\u1161"]),
        st.characters(codec="utf-8", max_codepoint=0x2FFF),
    ),
    max_size=12,
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Zürich", "Zu\u0308rich"),
        ("New  York", "New York"),
        ("New\u00a0York", " New\tYork\n"),
        ("각", "\u1100\u1161\u11a8"),
    ],
)
def test_what_looks_the_same_has_one_form(one: str, other: str) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(("one", "other"), [("10²", "102"), ("Paris", "paris"), ("a b", "ab")])
def test_what_means_something_else_stays_apart(one: str, other: str) -> None:
    assert normal(one) != normal(other)


@given(text=TEXTS, space=st.sampled_from(SPACES))
def test_the_form_is_one_of_its_own_and_the_same_for_all_spellings(text: str, space: str) -> None:
    form = normal(text)
    assert normal(form) == form
    assert normal(unicodedata.normalize("NFD", text)) == form
    assert normal(space.join(["", *text.split(), ""])) == form


@given(texts=st.lists(st.one_of(st.none(), TEXTS), max_size=8))
@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_a_column_has_the_form_of_each_of_its_texts(
    type_: pa.DataType, texts: list[str | None]
) -> None:
    found = normal_column(pa.array(texts, type_))
    assert found.type == type_
    assert found.to_pylist() == [None if text is None else normal(text) for text in texts]


def test_a_column_in_normal_form_is_not_copied() -> None:
    column = pa.array(["Nice", None, "New York"])
    assert normal_column(column) is column


def test_no_character_that_composition_changes_is_overlooked() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    alone = [c for c in characters if normal(c) != c]
    marks = [c for c in characters if unicodedata.combining(c)]
    joins = [
        second
        for c in characters
        if len(pair := unicodedata.normalize("NFD", c)) > 1
        for second in pair[1:]
    ]
    seen = normal_column(pa.array([f"a{c}" for c in (*alone, *marks, *joins)]))
    assert seen.to_pylist() == [normal(f"a{c}") for c in (*alone, *marks, *joins)]
    assert set(_matched([*marks, *joins, *(c for c in alone if not c.isspace())])) == {True}


def _matched(characters: list[str]) -> list[bool]:
    return pc.match_substring_regex(pa.array(characters), _ODD).to_pylist()
