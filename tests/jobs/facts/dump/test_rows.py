from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest

from jobs.facts.dump.files import FACT
from jobs.facts.dump.problems import FINE, PROBLEMS
from jobs.facts.dump.rows import UNDATED, judge
from tests.jobs.facts.conftest import NOW, fact

LATE = timezone(timedelta(hours=-5))


def judged(dump, content, **options):
    """Return the kinds of all rows, and the facts without a problem."""
    found = list(judge(dump(content), as_of=NOW, **options))
    codes = np.concatenate([batch.codes for batch in found])
    kinds = [None if code == FINE else PROBLEMS[code].kind for code in codes]
    return kinds, [row for batch in found for row in batch.facts.to_pylist()]


@pytest.mark.parametrize("name", FACT)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null {}"),
        ("", "empty {}"),
        (" \t\n\u2003", "empty {}"),
        ("x" * 1_001, "over-long {}"),
        ("ü" * 1_000, None),
    ],
)
def test_each_part_of_a_fact_must_be_text_of_some_length(dump, name, value, kind):
    kinds, facts = judged(dump, [fact(), fact() | {name: value}])
    assert kinds == [None, kind and kind.format(name)]
    assert len(facts) == kinds.count(None)


def test_white_space_around_text_does_not_count(dump):
    assert judged(dump, [fact(" Lyon\u00a0", "country ", "\nFrance")])[1] == [
        fact(target_true=None, time=UNDATED, row=0)
    ]


@pytest.mark.parametrize(
    "column",
    [pa.array([1, 2]), pa.array([b"a", b"b"]), pa.array([["a"], ["b"]]), pa.array([True, False])],
)
def test_a_column_of_another_type_is_distinguished_from_a_null_one(dump, column):
    content = pa.table({"subject": ["a", "b"], "relation": ["r", "r"], "object": column})
    assert judged(dump, content)[0] == ["object of a wrong type"] * 2
    nothing = content.set_column(2, "object", pa.nulls(2))
    assert judged(dump, nothing)[0] == ["null object"] * 2


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("damage", [b"\xff", b"\xed\xa0\x80", b"\xc3"])
def test_text_that_is_not_utf8_spoils_its_row_only(dump, type_, damage):
    raw = pa.large_binary() if type_ == pa.large_string() else pa.binary()
    column = pa.array([b"Rome", b"ab" + damage, None, b"Oslo"], raw).view(type_)
    content = pa.table({"subject": list("abcd"), "relation": ["r"] * 4, "object": column})
    kinds, facts = judged(dump, content)
    assert kinds == [None, "object is not UTF-8", "null object", None]
    assert [(f["row"], f["object"]) for f in facts] == [(0, "Rome"), (3, "Oslo")]


@pytest.mark.parametrize(
    "type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_may_be_stored_in_any_way(dump, type_):
    content = pa.table({name: pa.array(["a"]).cast(type_) for name in FACT})
    assert judged(dump, content)[0] == [None]


MOMENT = datetime(2026, 11, 23, 5, tzinfo=UTC)
MICROSECONDS = 1_795_410_000_000_000


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (MOMENT, MICROSECONDS),
        (MOMENT.astimezone(LATE), MICROSECONDS),
        (MOMENT.replace(tzinfo=None), MICROSECONDS),
        ("2026-11-23T05:00:00Z", MICROSECONDS),
        ("2026-11-23 00:00:00-05:00", MICROSECONDS),
        (" 2026-11-23T05:00", MICROSECONDS),
        (date(2026, 11, 23), MICROSECONDS - 5 * 3600 * 10**6),
        ("2026-11-23", MICROSECONDS - 5 * 3600 * 10**6),
        (None, UNDATED),
    ],
)
def test_times_are_read_in_any_form(dump, value, time):
    kinds, facts = judged(dump, [fact(updated_at=value)])
    assert (kinds, facts[0]["time"]) == ([None], time)


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
def test_times_are_read_in_any_unit(dump, unit):
    column = pa.array([MOMENT, None]).cast(pa.timestamp(unit, "UTC"))
    content = pa.table({name: ["a", "b"] for name in FACT}).append_column("updated_at", column)
    assert [f["time"] for f in judged(dump, content)[1]] == [MICROSECONDS, UNDATED]


@pytest.mark.parametrize("name", ["updated_at", "valid_until"])
@pytest.mark.parametrize("value", ["yesterday", "", 20261123, 1.5, "9999-12-31T23:00:00-05:00x"])
def test_what_is_no_time_is_set_aside(dump, name, value):
    assert judged(dump, [fact() | {name: value}])[0] == [f"{name} is not a time"]


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        (NOW, False),
        (NOW + timedelta(microseconds=1), True),
        (date(2026, 11, 23), True),  # until its last moment
        (date(2026, 11, 22), False),
        ("2026-11-23", True),
        ("9999-12-31", True),
        (date(9999, 12, 31), True),
        ("2026-11-23T05:59", False),
        (None, True),
    ],
)
def test_facts_hold_until_their_time(dump, value, holds):
    assert judged(dump, [fact(valid_until=value)])[0] == [None if holds else "no longer valid"]


def test_relations_need_a_template_where_templates_are_given(dump):
    rows = [fact(), fact(relation=" capital "), fact(relation="mayor")]
    kinds, _ = judged(dump, rows, relations={"country", "capital"})
    assert kinds == [None, None, "relation without template"]
    assert judged(dump, rows)[0] == [None] * 3


def test_control_characters_are_noted_and_kept(dump):
    rows = [fact("a\tb"), fact("a b"), fact("a\x00"), fact(object="\x85x"), fact(None, "a\tb")]
    (batch,) = judge(dump(rows), as_of=NOW)
    assert batch.controls.tolist() == [0, 2]
    assert [row["subject"] for row in batch.facts.to_pylist()] == ["a\tb", "a b", "a\x00", "Lyon"]


def test_old_objects_may_be_missing_but_not_of_another_type(dump):
    rows = [fact(target_true=" Gaul "), fact(target_true=" "), fact(target_true=None)]
    assert [f["target_true"] for f in judged(dump, rows)[1]] == ["Gaul", None, None]
    assert judged(dump, [fact(target_true=1)])[0] == ["target_true of a wrong type"]
