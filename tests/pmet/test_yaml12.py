import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pmet.yaml12 import YAMLTextError, dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("no", "no"),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("2E5", 200000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("2026-11-23", "2026-11-23"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("gpt-j-6b", "gpt-j-6b"),
        ("'1e-3'", "1e-3"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        ("<<: 1", {"<<": 1}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("a: &x [1]\nb: *x\n", ["line 2: aliases (*name) are not read; write the value out"]),
        ("a: &x\n  b: *x\n", ["line 2: aliases (*name) are not read; write the value out"]),
        (
            "a: 1\nb: {c: 1, c: 2}\na: 3\n",
            [
                "line 2: key 'c' is already given on line 2",
                "line 3: key 'a' is already given on line 1",
            ],
        ),
        ("- {a: 1, a: 2}", ["line 1: key 'a' is already given on line 1"]),
        ("1: a", ["line 1: key '1' is not text"]),
        ("? [a]\n: b", ["line 1: key [ScalarNode(tag='tag:yaml.org,2002:str', value='a')]"]),
        ("a: [", ["line 1: expected the node content, but found '<stream end>'"]),
        ("a: 1\n--- \nb: 2", ["line 2: but found another document"]),
        ("a: !!python/object/apply:os.system [ls]", ["line 1: could not determine a construct"]),
        ('a: "\\ud800"', ["line 1: '\\ud800' holds a lone surrogate; write valid Unicode"]),
        ('"\\udfff": 1', ["line 1: '\\udfff' holds a lone surrogate; write valid Unicode"]),
        ("a: \x01", ["unacceptable character #x0001"]),
        ("\ud800", ["unacceptable character #xd800"]),
        ("[" * 40 + "]" * 40, ["line 1: nested more than 32 levels deep"]),
        ("9" * 5000, ["Exceeds the limit"]),
    ],
)
def test_what_is_refused_is_named_with_its_line(text, problems):
    with pytest.raises(YAMLTextError) as caught:
        parse_yaml(text)
    assert len(caught.value.problems) == len(problems)
    for said, wanted in zip(caught.value.problems, problems, strict=True):
        assert said.startswith(wanted)
        assert "\n" not in said


def test_bombs_do_no_harm():
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10))
    for text in (f"l0: &l0 [x]\n{levels}", "[" * 500_000, "{a: " * 100_000):
        start = time.perf_counter()
        with pytest.raises(YAMLTextError):
            parse_yaml(text)
        assert time.perf_counter() - start < 10


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.from_regex(r"[-+]?[0-9.]{1,3}([eE:_][-+]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["1e-3", "0o7", "010", "08", "on", "~", "null", "2026-11-23", "=", "<<"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_written_is_read_back_by_this_reader_and_by_others(value):
    assert parse_yaml(dump_yaml(value)) == value
    assert yaml.safe_load(dump_yaml(value)) == value
