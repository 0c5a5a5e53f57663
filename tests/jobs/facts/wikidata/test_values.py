"""Wikidata's values as text."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from jobs.facts.wikidata.entities import DataValue
from jobs.facts.wikidata.values import Value, ValueRefusedError, plain
from tests.jobs.facts.wikidata.conftest import amount, ref, text, time

KILO = "http://www.wikidata.org/entity/Q11570"


def value(given: dict[str, Any]) -> DataValue:
    return DataValue(given["type"], msgspec.Raw(json.dumps(given["value"]).encode()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ref("Q42"), Value("", 42)),
        (ref("P31"), Value("", -31)),
        ({"type": "wikibase-entityid", "value": {"numeric-id": 7}}, Value("", 7)),
        (text(" a\tb "), Value("a\tb")),
        (time("+1931-03-01T00:00:00Z"), Value("1 March 1931")),
        (time("+1931-03-00T00:00:00Z", 10), Value("March 1931")),
        (time("+1931-00-00T00:00:00Z", 9), Value("1931")),
        (time("+1931-00-00T00:00:00Z", 11), Value("1931")),
        (time("+1931-05-00T00:00:00Z", 11), Value("May 1931")),
        (time("-0044-03-15T00:00:00Z"), Value("15 March 44 BC")),
        (time("+1965-00-00T00:00:00Z", 8), Value("1960s")),
        (time("+1801-00-00T00:00:00Z", 7), Value("19th century")),
        (time("+1900-00-00T00:00:00Z", 7), Value("19th century")),
        (time("+2000-00-00T00:00:00Z", 7), Value("20th century")),
        (time("+2050-00-00T00:00:00Z", 7), Value("21st century")),
        (amount("+1234567"), Value("1234567")),
        (amount("-0.50"), Value("-0.50")),
        (amount("+80", KILO), Value("80", 11570)),
        ({"type": "monolingualtext", "value": {"text": "Ur", "language": "mul"}}, Value("Ur")),
    ],
)
def test_values_as_text(given: dict[str, Any], expected: Value) -> None:
    assert plain(value(given), ("en", "mul")) == expected


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (time("+1500-00-00T00:00:00Z", 6), "coarse-time"),
        (time("yesterday"), "unreadable"),
        (time("+1931-13-01T00:00:00Z"), "unreadable"),
        (amount("many"), "unreadable"),
        (
            {"type": "monolingualtext", "value": {"text": "Ur", "language": "fr"}},
            "another-language",
        ),
        ({"type": "globecoordinate", "value": {}}, "value-type"),
        ({"type": "wikibase-entityid", "value": {"id": "L7-F1"}}, "value-type"),
    ],
)
def test_values_that_are_no_text(given: dict[str, Any], code: str) -> None:
    with pytest.raises(ValueRefusedError) as refused:
        plain(value(given), ("en", "mul"))
    assert refused.value.args[0] == code


def test_other_languages_write_dates_in_iso_8601() -> None:
    days = [time("+1931-03-01T00:00:00Z"), time("+0931-03-00T00:00:00Z", 10)]
    assert [plain(value(d), ("de", "en")).text for d in days] == ["1931-03-01", "0931-03"]
    with pytest.raises(ValueRefusedError):
        plain(value(time("+1965-00-00T00:00:00Z", 8)), ("de",))
