"""Which statement holds now."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import pytest

from jobs.facts.wikidata.entities import decode_statements
from jobs.facts.wikidata.statements import current
from jobs.facts.wikidata.values import ValueRefusedError, plain
from tests.jobs.facts.wikidata.conftest import statement, text, time, year

TODAY = (2026, 11, 28)


def held(*statements: dict[str, Any]) -> tuple[str, Any, Counter[str]]:
    passed: Counter[str] = Counter()
    decoded = decode_statements(msgspec.Raw(json.dumps(statements).encode()))
    value, until = current(decoded, TODAY, passed)
    return plain(value, ("en",)).text, until, +passed


A, B, C = text("A"), text("B"), text("C")


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([statement(A)], "A"),
        ([statement(A), statement(B, "preferred")], "B"),
        ([statement(A, "deprecated"), statement(B)], "B"),
        ([statement(A, "of another rank"), statement(B)], "B"),
        ([statement(A, P582=year(2019)), statement(B)], "B"),
        ([statement(A, P582="somevalue"), statement(B)], "B"),
        ([statement(A, P582="novalue")], "A"),
        ([statement(A, P582=time("+2026-11-29T00:00:00Z"))], "A"),
        ([statement(A, P582=year(2026)), statement(B)], "B"),
        ([statement(A, P580=year(2027)), statement(B)], "B"),
        ([statement(A, P580=year(2019)), statement(B, P580=year(2020))], "B"),
        ([statement(A, P585=year(2020)), statement(B, P585=year(2010))], "A"),
        ([statement(A), statement(B, P580=year(1900))], "B"),
        ([statement(A), statement(A)], "A"),
        ([statement("somevalue"), statement("novalue"), statement(A)], "A"),
        ([statement(A, P582=A)], "A"),
    ],
)
def test_the_value_that_holds(statements: list[dict[str, Any]], expected: str) -> None:
    assert held(*statements)[0] == expected


@pytest.mark.parametrize(
    ("statements", "code"),
    [
        # A preferred statement that has ended does not revive those below it.
        ([statement(A, "preferred", P582=year(2019)), statement(B)], "ended"),
        ([statement(A), statement(B)], "several-values"),
        ([statement(A, P580=year(1)), statement(B, P580=year(1))], "several-values"),
        ([statement(A, "deprecated")], "deprecated"),
        ([statement("novalue"), statement(A, P582=year(2019))], "without-a-value"),
        ([statement("somevalue")], "of-an-unknown-value"),
        ([{"mainsnak": {"snaktype": "value"}}], "of-an-unknown-value"),
        ([statement(A, P580=year(2027))], "not-begun"),
    ],
)
def test_no_value_holds(statements: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(ValueRefusedError) as refused:
        held(*statements)
    assert refused.value.args[0] == code


def test_statements_passed_over_are_counted() -> None:
    _, until, passed = held(
        statement(A, "deprecated"),
        statement(B, "preferred", P582=year(2019)),
        statement(C, "preferred", P580=year(2001), P582=year(2030)),
        statement(B, "preferred", P580=year(2000)),
        statement(A),
    )
    assert until == (2030, 1, 1)
    assert passed == {
        "deprecated": 1,
        "ended": 1,
        "of lower rank": 1,
        "replaced by a later value": 1,
    }
