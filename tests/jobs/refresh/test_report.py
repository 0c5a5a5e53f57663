"""The report of a refresh: its content, and that text from a dump stays text."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from jobs.refresh.config import RefreshConfig
from jobs.refresh.home import LEDGER, NIGHT, Home, path
from jobs.refresh.ledger import Entry, Ledger, LedgerChange, changes_table
from jobs.refresh.report import CHANGES, REPORT, write_night_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00\ud800"
AFTER = {"efficacy": 0.9, "generalization": 0.8, "specificity": 0.7, "score": 0.79}


class Page(HTMLParser):
    """The text of a page, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text.partition("</style>")[2])
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def report(tmp_path):
    """Write the report of a second refresh; return its page."""
    config = RefreshConfig(
        model="gpt2",
        facts=("x",),
        templates="t",
        home=str(tmp_path),
        hparams="gpt-j-6b",
        price_per_hour=36.0,
    )
    home = Home(str(tmp_path))

    def write(entries: list[Entry], changes: list[LedgerChange] = [], **night: Any) -> Page:  # noqa: B006
        metrics = {"before": {}, "after": AFTER, "gates": [], "counts": {"edited": 7}}
        said = {
            "status": "finished",
            "started_at": "2026-11-02T02:00:00+00:00",
            "finished_at": "2026-11-02T02:10:00+00:00",
            "facts": ["facts/2"],
            "rows": {"read": 9},
            "ledger": Ledger({e.key: e for e in entries}).counts(),
            "targets": {"found": 3, "stored": 4},
            "metrics": metrics,
            "error": None,
        }
        for version in (1, 2):
            follows = version - 1 or None
            about = {"version": version, "date": f"2026-11-0{version}", "follows": follows}
            home.store.write_json(path(version, NIGHT), said | about | night)
        home.store.write_table(path(2, LEDGER), Ledger({e.key: e for e in entries}).table())
        home.store.write_table(path(2, CHANGES), changes_table(changes))
        write_night_report(home, config, 2)
        return Page(home.store.read_bytes(path(2, REPORT)).decode())

    return write


def entry(subject: str, state: str = "live", **more: Any) -> Entry:
    values = {"object": "Ann", "prompt": "{}", "reason": None, "since": "2026-11-01", "version": 1}
    return Entry("mayor", subject, state=state, **values | more)


def test_it_says_what_a_person_asks_first(report) -> None:
    page = report(
        [
            entry("Nice", learned=False, misses=2),
            entry("Lyon", learned=True),
            entry("Brest", "quarantined", reason="no target: too far"),
            entry("Arles", "retracted", object=None, reason="asked for"),
        ],
        [LedgerChange("changed", "mayor", "Lyon", "Bob", "Ann")],
    )
    for words in (
        "Promoted The refresh file sets no gates.",
        "facts edited 7",
        "not learned 1",
        "quarantined 1",
        "time 10 min 00 s cost 6.00",
        "efficacy – 90.0 % 90.0 % +0.0 points",
        "changed mayor Lyon Bob Ann",
        "mayor Nice Ann 2",
        "Quarantined Left out of the model",
        "mayor Brest Ann no target: too far 2026-11-01",
        "mayor Arles – asked for",
    ):
        assert words in page.text
    # The scores of both versions.
    assert "svg" in page.tags


def test_a_version_that_is_held_back_says_by_what(report) -> None:
    gates = [
        {"name": "efficacy", "threshold": 0.95, "value": 0.9, "passed": False},
        {"name": "efficacy_drop_since_last", "kind": "drop_since_last", "threshold": 0.01}
        | {"value": 0.0, "passed": True},
    ]
    metrics = {"before": {}, "after": AFTER, "gates": gates, "counts": {"edited": 7}}
    page = report([entry("Nice")], status="held", metrics=metrics)
    assert "Held back Gates not passed: efficacy. Version 1 stays in use." in page.text
    assert "at least 95.0 % at most 1.0 points below the last run" in page.text


def test_text_from_a_dump_stays_text(report) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    page = report(
        [entry(hostile, "quarantined", object=hostile, reason=hostile)],
        [LedgerChange("added", hostile, hostile, hostile, hostile, hostile)],
        rows={hostile: 1},
        facts=[hostile],
    )
    assert not page.tags & {"script", "img", "iframe"}
    assert "<script>alert(1)</script>" in page.text


def test_long_tables_are_cut_and_say_so(report) -> None:
    page = report([entry(f"city {i}", "quarantined", reason="x") for i in range(300)])
    assert "100 more are not shown; the ledger has them." in page.text


def test_a_refresh_without_edited_facts_has_a_page(report) -> None:
    page = report([], metrics=None)
    assert "Promoted" in page.text
    assert "Scores" not in page.text
