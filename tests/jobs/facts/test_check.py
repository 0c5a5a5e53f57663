from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts.check import check, check_dump
from jobs.facts.dump import partitions
from jobs.facts.dump.files import open_dump
from jobs.facts.templates import parse_templates
from pipeline.data.tables import read_requests
from pipeline.errors import FactDumpError
from tests.jobs.facts.conftest import NOW, fact
from tests.jobs.facts.dump.test_files import damage_pages
from tests.jobs.facts.test_diff import DAYS, ROWS, written


def found(result):
    return {f.kind: (f.level, f.count) for f in result.findings}


def reasons(result):
    return {e.row: e.reason for f in result.findings for e in f.examples}


@pytest.fixture
def checked(dump):
    """Check rows of a dump."""
    return lambda rows, **options: check_dump(dump(rows), as_of=NOW, **options)


def test_a_good_dump_has_no_findings(checked):
    result = checked([fact("A"), fact("B", "capital"), fact("A", "capital")])
    assert (result.rows, result.usable, result.findings) == (3, 3, [])
    assert (result.is_usable, result.is_clean) == (True, True)


def test_rows_that_repeat_give_way_to_the_first(checked):
    result = checked([fact("A"), fact("B"), fact("A "), fact("A")])
    assert found(result) == {"duplicate": ("warning", 2)}
    reason = "repeats row 0: same subject, relation and object; keep one"
    assert reasons(result) == {2: reason, 3: reason}
    assert (result.usable, result.is_usable, result.is_clean) == (2, True, False)


def test_rows_that_contradict_each_other_are_all_set_aside(checked):
    rows = [fact("A", object="1"), fact("B"), fact("A", object="2"), fact("A", object="1")]
    result = checked(rows)
    assert found(result) == {"contradiction": ("error", 3)}
    assert [text.split(":")[0] for text in reasons(result).values()] == [
        "contradicts row 2",
        "contradicts row 0",
        "contradicts row 2",
    ]
    assert result.usable == 1


def test_the_newest_row_wins_where_times_decide(checked):
    rows = [
        fact("A", object="1", updated_at=DAYS[1]),
        fact("A", object="2", updated_at=DAYS[2]),
        fact("A", object="3", updated_at=None),
        fact("A", object="2", updated_at=DAYS[1]),
    ]
    result = checked(rows)
    assert found(result) == {"duplicate": ("warning", 1), "replaced by a newer row": ("note", 2)}
    assert reasons(result) == {
        0: "replaced by row 1, whose updated_at is later",
        2: "replaced by row 1, whose updated_at is later",
        3: "repeats row 1: same subject, relation and object; keep one",
    }


def test_notes_are_what_a_good_dump_may_hold(checked):
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    result = checked([fact("A", valid_until=ended), fact("B", valid_until=None)])
    assert found(result) == {"no longer valid": ("note", 1)}
    assert (result.is_usable, result.is_clean, result.usable) == (True, True, 1)


def test_findings_show_the_first_rows_in_a_few_words(checked):
    rows = [fact(None, object="long " * 100), *(fact("", object=f"\x1b[31m{i}") for i in range(9))]
    result = checked(rows)
    null, empty = result.findings
    assert null.examples[0].text == "null · country · " + ("long " * 100)[:79] + "…"
    assert [(e.row, e.text) for e in empty.examples] == [
        (i + 1, f"'' · country · \\x1b[31m{i}") for i in range(5)
    ]
    assert empty.count == 9


def test_a_control_character_is_a_warning_and_its_row_is_used(checked):
    result = checked([fact("A\tB"), fact("A\tB")])
    assert found(result) == {"duplicate": ("warning", 1), "control character": ("warning", 1)}
    assert (result.usable, result.is_clean) == (1, False)


def test_relations_without_template_are_found_where_there_are_templates(checked):
    templates = parse_templates({"country": {"prompt": "{} is in"}}, "t")
    rows = [fact("A"), fact("A", "mayor")]
    assert found(checked(rows, templates=templates)) == {"relation without template": ("error", 1)}
    assert found(checked(rows)) == {}


def test_text_that_is_not_utf8_is_shown_escaped(checked):
    column = pa.array([b"b\xff"]).view(pa.string())
    result = checked(pa.table({"subject": column, "relation": ["r"], "object": ["o"]}))
    assert result.findings[0].examples[0].text == "b\\\\xff · r · o"
    assert not result.is_usable


def test_damaged_files_are_findings_and_the_others_are_read(write, tmp_path):
    write([fact("A")], "d/1.parquet")
    Path(write([fact("B")], "d/2.parquet")).write_bytes(b"PAR1 and no more")
    damage_pages(write([fact(str(i)) for i in range(1000)], "d/3.parquet"))
    result = check(f"{tmp_path}/d", as_of=NOW)
    assert found(result) == {"damaged file": ("error", 2)}
    named = sorted(example.reason for example in result.findings[0].examples)
    assert ["d/2.parquet" in named[0], "d/3.parquet" in named[1]] == [True, True]
    assert (result.usable, result.is_usable) == (1, False)


def test_a_dump_of_damaged_files_only_is_not_usable(write):
    path = write([])
    Path(path).write_bytes(b"")
    assert check(path).damaged == 1


def test_a_missing_column_is_an_error_of_its_own(write):
    with pytest.raises(FactDumpError, match="has no column object"):
        check(write([{"subject": "a", "relation": "b"}]))


REQUESTS = [
    {"prompt": "{} is", "subject": "A", "target_new": "x"},
    {"prompt": "{} is", "subject": "A", "target_new": "x"},
    {"prompt": "{} was", "subject": "A", "target_new": "x"},
    {"prompt": "{} was", "subject": "A", "target_new": "y"},
    {"prompt": "no 'place'", "subject": "A", "target_new": "y"},
    {"prompt": "none", "subject": "A", "target_new": "y"},
    {"prompt": "{} has", "subject": None, "target_new": "y"},
]


def test_request_tables_show_the_reasons_that_a_run_gives(write):
    path = write(pa.Table.from_pylist(REQUESTS))
    result = check(path)
    assert reasons(result) == {r.row: r.reason for r in read_requests(path).rejected}
    assert found(result) == {
        "contradiction": ("error", 2),
        "prompt … holds N places for the subject": ("error", 2),
        "subject is null": ("error", 1),
        "duplicate": ("warning", 1),
    }
    assert (result.kind, result.rows, result.usable) == ("edit requests", 7, 1)


def test_a_damaged_request_table_is_a_finding(write):
    path = write(pa.Table.from_pylist(REQUESTS * 300))
    damage_pages(path)
    result = check(path)
    assert (result.kind, result.damaged, result.is_usable) == ("edit requests", 1, False)
    assert path in result.findings[0].examples[0].reason


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, size=st.sampled_from([3, 100]))
def test_every_row_is_used_or_in_one_finding(tmp_path, rows, size):
    was = partitions.PARTITION_ROWS
    partitions.PARTITION_ROWS = size
    try:
        result = check_dump(written(rows, tmp_path / "d"), as_of=NOW)
    finally:
        partitions.PARTITION_ROWS = was
    assert result.usable + sum(f.count for f in result.findings) == len(rows)
    examples = Counter(e.row for f in result.findings for e in f.examples)
    assert all(count == 1 for count in examples.values())


def test_only_files_with_examples_are_read_again(write, tmp_path, monkeypatch):
    write([fact("A")], "d/1.parquet")
    write([fact("")], "d/2.parquet")
    dump = open_dump(f"{tmp_path}/d")
    opened = []
    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda s: (opened.append(s.name), real(s))[1])
    check_dump(dump, as_of=NOW)
    assert [Path(str(name)).name for name in opened] == ["1.parquet", "2.parquet", "2.parquet"]


def test_unicode_forms_and_white_space_hide_no_contradiction(checked):
    rows = [fact("Zürich", object="1"), fact("Zu\u0308rich", object="2"), fact("New  York")]
    result = checked([*rows, fact("New York"), fact("Oslo")])
    assert found(result) == {"contradiction": ("error", 2), "duplicate": ("warning", 1)}
    assert reasons(result)[3].startswith("repeats row 2: same subject, relation and object")
    assert result.usable == 2


def test_requests_in_the_partitions_of_a_folder_are_checked(tmp_path):
    row = {"prompt": "{} is", "subject": "A", "target_new": "B"}
    (tmp_path / "relation=a").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "relation=a" / "x.parquet")
    result = check(str(tmp_path))
    assert (result.kind, result.rows, result.usable) == ("edit requests", 1, 1)


def test_facts_of_one_subject_after_the_same_text_are_counted(checked, tmp_path):
    prompts = {"born": "{} was born in", "died": "{} died in", "capital": "The capital of {} is"}
    templates = parse_templates({name: {"prompt": text} for name, text in prompts.items()}, "t")
    rows = [fact("A", "born"), fact("B", "born"), fact("A", "capital"), fact("A", "died")]
    assert found(checked(rows)) == {}
    result = checked(rows, templates=templates)
    assert found(result) == {"shared key": ("note", 2)}
    (example,) = result.findings[0].examples
    assert (example.row, example.text) == (0, "A · born · France")
    assert example.reason.startswith("2 facts of this subject are stated after the same text")
    assert result.is_clean

    requests = [
        {"prompt": prompts[r["relation"]], "subject": r["subject"], "target_new": r["object"]}
        for r in rows
    ]
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "requests.parquet")
    result = check(str(tmp_path / "requests.parquet"))
    assert found(result) == {"shared key": ("note", 2)}
    assert [(e.row, e.text) for e in result.findings[0].examples] == [(0, "subject A")]
