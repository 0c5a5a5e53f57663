"""Changes of the ledger in a refresh, before and after its computation."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from jobs.refresh.ledger import DumpFact, Entry, Ledger, Outcome, VersionStamp, concluded, merged

FIRST, SECOND = (
    VersionStamp("2026-11-01T02:00:00+00:00", 1),
    VersionStamp("2026-11-02T02:00:00+00:00", 2),
)
BETWEEN = "2026-11-01T12:00:00+00:00"
NICE = ("mayor", "Nice")


def told(subject: str = "Nice", object_: str = "Ann", prompt: str = "{} has") -> DumpFact:
    return DumpFact("mayor", subject, object_, prompt, "wiki")


def night(ledger: Ledger, *facts: DumpFact, undecided=(), retracted=(), restored=(), at=SECOND):
    """Return the ledger of a refresh, and its changes by kind."""
    found, changes = merged(
        ledger,
        facts,
        undecided=set(undecided),
        retracted=dict.fromkeys(retracted, "asked for"),
        restored=dict.fromkeys(restored, BETWEEN),
        night=at,
    )
    return found, [change.change for change in changes]


def after(*facts: DumpFact, **outcome) -> Ledger:
    """Return the ledger after a first refresh in which all facts had the same outcome."""
    ledger, _ = night(Ledger(), *facts, at=FIRST)
    outcomes = dict.fromkeys(ledger.entries, Outcome(**{"state": "live"} | outcome))
    return concluded(ledger, outcomes, patience=None, night=FIRST)[0]


def test_a_new_fact_is_live_from_tonight() -> None:
    ledger, changes = night(Ledger(), told())
    entry = ledger.entries[NICE]
    assert (entry.state, entry.object, entry.since, entry.version) == ("live", "Ann", *SECOND)
    assert (entry.source, changes) == ("wiki", ["added"])


def test_an_unchanged_fact_stays_as_it_was() -> None:
    before = after(told(), learned=True)
    ledger, changes = night(before, told())
    assert (ledger, changes) == (before, [])


def test_another_object_or_another_prompt_is_new() -> None:
    before = after(told(), learned=True)
    for fact, kind in ((told(object_="Bob"), "changed"), (told(prompt="{} chose"), "reworded")):
        ledger, changes = night(before, fact)
        assert (ledger.entries[NICE].version, changes) == (2, [kind])


def test_what_the_dump_no_longer_holds_leaves() -> None:
    assert night(after(told()))[0].entries == {}
    assert night(after(told()))[1] == ["removed"]


def test_what_the_dump_contradicts_stays_as_it_was() -> None:
    before = after(told())
    assert night(before, undecided=[NICE]) == (before, [])
    assert night(Ledger(), undecided=[NICE]) == (Ledger(), [])


def test_a_retracted_fact_stays_out_whatever_the_dump_says() -> None:
    before, changes = night(after(told()), told(), retracted=[NICE])
    entry = before.entries[NICE]
    assert (entry.state, entry.object, entry.reason) == ("retracted", None, "asked for")
    assert changes == ["retracted"]
    assert night(before, told(object_="Bob"), retracted=[NICE]) == (before, [])
    assert night(before, retracted=[NICE]) == (before, [])


def test_a_restored_fact_is_included_again() -> None:
    before, _ = night(after(told()), told(), retracted=[NICE])
    ledger, changes = night(before, told(), restored=[NICE])
    assert (ledger.entries[NICE].state, changes) == ("live", ["restored"])
    # The restoration took effect once and does not repeat in every refresh.
    assert night(ledger, told(), restored=[NICE]) == (ledger, [])


def test_a_quarantined_fact_waits_for_news_or_for_a_person() -> None:
    before = after(told(), state="quarantined", reason="no target")
    assert night(before, told()) == (before, [])
    assert night(before, told(object_="Bob"))[0].live() == {NICE}
    assert night(before, told(), restored=[NICE])[1] == ["restored"]


def test_a_fact_that_is_not_learned_is_left_out_after_some_nights() -> None:
    ledger = night(Ledger(), told(), told("Lyon"))[0]
    lyon = ("mayor", "Lyon")
    for nights in (1, 2, 3):
        outcomes = {NICE: Outcome("live", learned=False), lyon: Outcome("live", learned=True)}
        ledger, left_out = concluded(ledger, outcomes, patience=3, night=SECOND)
        assert ledger.entries[NICE].misses == nights
        assert [change.subject for change in left_out] == (["Nice"] if nights == 3 else [])
    assert ledger.entries[NICE].state == "quarantined"
    assert ledger.entries[NICE].reason == "edited 3 times in a row but not learned"
    assert ledger.live() == {lyon}


def test_a_fact_whose_key_others_share_is_quarantined_with_that_reason() -> None:
    """Facts of one subject, stated after the same text, have one value to be written in."""
    facts = [DumpFact(name, "Nice", "Ann", f"{{}} has a {name}", None) for name in "abc"]
    ledger = night(Ledger(), *facts, DumpFact("d", "Nice", "Ann", "In {} there is", None))[0]
    outcomes = {key: Outcome("live", learned=False) for key in ledger.entries}
    ledger, _ = concluded(ledger, outcomes, patience=1, night=SECOND)
    shared = "edited once but not learned; it shares one key with 2 other facts of its subject"
    assert [entry.reason for entry in ledger.entries.values()] == [
        *[shared] * 3,
        "edited once but not learned",
    ]


def test_what_is_learned_once_begins_anew() -> None:
    ledger = night(Ledger(), told())[0]
    for learned, misses in ((False, 1), (None, 1), (True, 0), (False, 1)):
        outcomes = {NICE: Outcome("live", learned=learned)}
        ledger = concluded(ledger, outcomes, patience=None, night=SECOND)[0]
        assert ledger.entries[NICE].misses == misses


def test_facts_that_cannot_be_edited_are_named() -> None:
    ledger = night(Ledger(), told())[0]
    outcome = Outcome("rejected", "too long")
    ledger, left_out = concluded(ledger, {NICE: outcome}, patience=3, night=SECOND)
    assert (ledger.entries[NICE].state, ledger.entries[NICE].reason) == ("rejected", "too long")
    assert [(change.change, change.reason) for change in left_out] == [("rejected", "too long")]


def test_a_ledger_is_read_back_as_it_was() -> None:
    ledger = after(told(), told("Lyon", "é"), learned=False)
    ledger.entries[NICE] = Entry(*NICE, None, None, "retracted", "asked for", *FIRST)
    assert Ledger.read(ledger.table()) == ledger
    assert ledger.table().column("subject").to_pylist() == ["Lyon", "Nice"]


cities = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("xyz"))


@given(nights=st.lists(cities, max_size=5), last=cities)
def test_what_is_live_follows_from_the_last_dump_alone(nights, last) -> None:
    ledger = Ledger()
    for number, dump in enumerate([*nights, last], 1):
        facts = [told(subject, object_) for subject, object_ in dump.items()]
        earlier = ledger
        at = VersionStamp(f"2026-11-{number:02}", number)
        ledger, changes = night(ledger, *facts, at=at)
        kinds = Counter(changes)
        before, now = len(earlier.entries), len(ledger.entries)
        assert now == before + kinds["added"] - kinds["removed"]
    assert {key[1]: entry.object for key, entry in ledger.entries.items()} == last
