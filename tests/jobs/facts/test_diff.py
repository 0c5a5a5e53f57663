import random
import unicodedata
from collections import defaultdict
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts.diff import CHANGES, SCHEMA, Change, Counts, diff_dumps
from jobs.facts.dump import partitions
from jobs.facts.dump.files import open_dump
from pipeline.data.normalization import normal
from pipeline.errors import FactDumpError
from tests.jobs.facts.conftest import NOW, fact, table

DAYS = [None, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)]


def changes(diff):
    return [Change(**row) for batch in diff.batches() for row in batch.to_pylist()]


@pytest.fixture
def compare(dump):
    """Return the changes from some rows to others, and the number of unchanged facts."""

    def compared(old, new, **options):
        options = {"as_of": NOW} | options
        with diff_dumps(dump(old, "old.parquet"), dump(new, "new.parquet"), **options) as diff:
            return changes(diff), diff.counts

    return compared


def test_each_kind_of_change(compare):
    old = [fact("A"), fact("B"), fact("C"), fact("D")]
    new = [fact("D"), fact("B", object="Italy"), fact("E"), fact("A", "capital", "X")]
    new += [fact("C", object="1"), fact("C", object="2")]
    found, counts = compare(old, new)
    assert counts == Counts(added=2, changed=1, removed=1, undecided=1, unchanged=1)
    assert found == [
        Change("added", "A", "capital", None, "X"),
        Change("removed", "A", "country", "France", None),
        Change("changed", "B", "country", "France", "Italy"),
        Change("undecided", "C", "country", "France", None),
        Change("added", "E", "country", None, "France"),
    ]


def test_a_dump_against_itself_and_against_nothing(compare):
    rows = [fact("A"), fact("B")]
    assert compare(rows, rows) == ([], Counts(unchanged=2))
    assert compare(rows, [])[1] == Counts(removed=2)
    assert compare([], rows)[1] == Counts(added=2)
    assert compare([], []) == ([], Counts())


def test_a_contradiction_in_the_old_dump_held_nothing(compare):
    old = [fact("A", object="1"), fact("A", object="2")]
    assert compare(old, [fact("A")])[1] == Counts(added=1)
    assert compare(old, [])[1] == Counts()
    assert compare(old, old) == (
        [Change("undecided", "A", "country", None, None)],
        Counts(undecided=1),
    )


def test_facts_that_have_run_out_are_removed(compare):
    rows = [fact("A", valid_until=datetime(2026, 11, 22, tzinfo=UTC)), fact("B", valid_until=None)]
    found, counts = compare(rows, rows)
    assert counts == Counts(removed=1, unchanged=1)
    assert found == [Change("removed", "A", "country", "France", None)]
    assert compare(rows, rows, old_as_of=NOW)[1] == Counts(unchanged=1)
    assert compare(rows, rows, as_of=datetime(2026, 11, 1, tzinfo=UTC))[1] == Counts(unchanged=2)


def test_faulty_rows_state_nothing(compare):
    assert compare([fact("A")], [fact("A", object=""), fact("B", None)])[1] == Counts(removed=1)


def test_the_first_of_each_kind(dump):
    old, new = dump([], "o"), dump([fact(s) for s in "CAB"], "n")
    with diff_dumps(old, new, as_of=NOW) as diff:
        assert [change.subject for change in diff.first("added", 2)] == ["A", "B"]
        assert diff.first("removed", 2) == []
        assert diff.first("added", 0) == []
        assert next(diff.batches()).schema == SCHEMA


def test_a_closed_diff_leaves_nothing_behind(dump, tmp_path, monkeypatch):
    old, new = dump([], "o"), dump([fact()], "n")
    folder = tmp_path / "spill"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with diff_dumps(old, new, as_of=NOW):
        assert len(list(folder.iterdir())) == 1
    assert list(folder.iterdir()) == []
    (tmp_path / "n").write_bytes(b"")
    with pytest.raises(FactDumpError, match="cannot read"):
        diff_dumps(old, new, as_of=NOW)
    assert list(folder.iterdir()) == []


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["A", "B", "C", " A", "AB"]),
        st.sampled_from(["r", "s", "Bs"]),
        st.sampled_from(["x", "y", " x", ""]),
        st.sampled_from(DAYS),
    ),
    max_size=14,
)


def held(rows):
    """Settle rows fact by fact: return the objects, and the disputed facts."""
    by_fact = defaultdict(list)
    for subject, relation, object_, day in rows:
        if object_.strip():
            by_fact[subject.strip(), relation].append(
                (day or datetime.min.replace(tzinfo=UTC), object_.strip())
            )
    objects, disputed = {}, set()
    for key, values in by_fact.items():
        latest = {o for day, o in values if day == max(day for day, _ in values)}
        if len(latest) == 1:
            objects[key] = latest.pop()
        else:
            disputed.add(key)
    return objects, disputed


def expected(old, new):
    before, _ = held(old)
    after, disputed = held(new)
    found = set()
    for key in before.keys() | after.keys() | disputed:
        was, now = before.get(key), after.get(key)
        if key in disputed:
            found.add(Change("undecided", *key, was, None))
        elif was != now:
            kind = "added" if was is None else "removed" if now is None else "changed"
            found.add(Change(kind, *key, was, now))
    return found


def written(rows, path):
    import pyarrow.parquet as pq

    columns = ("subject", "relation", "object", "updated_at")
    content = table([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(content, path)
    return open_dump(str(path))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(old=ROWS, new=ROWS, size=st.sampled_from([3, 100]), seed=st.integers(0, 5))
def test_it_is_what_comparing_facts_one_by_one_gives(tmp_path, old, new, size, seed):
    """For any order of the rows, in memory and in partitions on disk."""
    was = partitions.PARTITION_ROWS
    partitions.PARTITION_ROWS = size
    try:
        results = []
        for shuffled in (False, True):
            if shuffled:
                old, new = (random.Random(seed).sample(rows, len(rows)) for rows in (old, new))
            dumps = (written(old, tmp_path / "o"), written(new, tmp_path / "n"))
            with diff_dumps(*dumps, as_of=NOW) as diff:
                results.append((changes(diff), diff.counts))
    finally:
        partitions.PARTITION_ROWS = was
    assert results[0] == results[1]
    found, counts = results[0]
    assert len(found) == len(set(found))
    assert set(found) == expected(old, new)
    assert all(getattr(counts, k) == sum(c.change == k for c in found) for k in CHANGES)
    assert counts.unchanged == len(held(old)[0].items() & held(new)[0].items())


@pytest.mark.parametrize("count", [1, 7])
def test_unicode_forms_and_white_space_are_no_difference(compare, monkeypatch, count):
    monkeypatch.setattr("jobs.facts.dump.survey.partition_count", lambda rows: count)
    old = [fact("Zürich", object="New York"), fact("Lyon"), fact("Nice", object="x")]
    new = [fact("Zu\u0308rich", object="New\u00a0 York"), fact("Lyon"), fact("Nice", object="ü")]
    found, counts = compare(old, new)
    assert found == [Change("changed", "Nice", "country", "x", "ü")]
    assert counts == Counts(changed=1, unchanged=2)
    rows = [fact("Zürich", object="a"), fact("Zu\u0308rich", object="b")]
    assert compare([], rows)[1] == Counts(undecided=1)


TYPED = st.sampled_from(["Zürich", "New York", "각", "a"])
SPELLED = st.builds(
    lambda text, form, space: unicodedata.normalize(form, text).replace(" ", space),
    TYPED,
    st.sampled_from(["NFC", "NFD"]),
    st.sampled_from([" ", "  ", "\u00a0", "\t"]),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(SPELLED, SPELLED, SPELLED), min_size=1, max_size=8))
def test_a_dump_is_compared_as_if_it_were_in_normal_form(compare, rows):
    facts = [fact(*row) for row in rows]
    forms = [fact(*map(normal, row)) for row in rows]
    found, counts = compare(forms, facts)
    undecided = {change.subject for change in found if change.change == "undecided"}
    assert all(change.change == "undecided" for change in found)
    assert counts == compare(forms, forms)[1]
    assert undecided <= {row[0] for row in rows}
