from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.facts.dump.files import FACT, open_dump
from pipeline.errors import FactDumpError
from tests.jobs.facts.conftest import fact


def rows_of(dump, names=FACT):
    return [row for batch in dump.batches(names) for row in batch.table.to_pylist()]


def test_rows_are_counted_over_files_in_their_order(write, monkeypatch):
    monkeypatch.setattr("jobs.facts.dump.files.BATCH_ROWS", 2)
    write([fact("A"), fact("B"), fact("C")], "d/1.parquet")
    write([fact("D")], "d/2.parquet")
    dump = open_dump(str(Path(write([], "d/3.parquet")).parent))
    assert dump.rows == 4
    assert [(b.first, b.table.column("subject").to_pylist()) for b in dump.batches(FACT)] == [
        (0, ["A", "B"]),
        (2, ["C"]),
        (3, ["D"]),
    ]


def test_columns_can_have_other_names(write):
    path = write([{"entity": "A", "relation": "r", "value": "o", "object": "x", "note": "n"}])
    dump = open_dump(path, {"subject": "entity", "object": "value"})
    assert rows_of(dump) == [fact("A", "r", "o")]
    assert set(dump.types) == {"subject", "relation", "object", "input_object", "note"}


def test_a_column_that_is_mapped_is_not_what_it_is_called(write):
    path = write([fact(source="2026-11-23")])
    dump = open_dump(path, {"updated_at": "source"})
    assert set(dump.types) == {*FACT, "updated_at"}
    swapped = open_dump(path, {"subject": "object", "object": "subject"})
    assert rows_of(swapped) == [fact("France", "country", "Lyon")]


def test_folders_are_columns_and_hidden_ones_are_left_out(write, tmp_path):
    for relation in ("capital", "head%20of", "__HIVE_DEFAULT_PARTITION__"):
        write([{"subject": "A", "object": relation}], f"d/relation={relation}/part.parquet")
    write([fact("unfinished")], "d/_temporary/0/part.parquet")
    dump = open_dump(f"{tmp_path}/d")
    assert [(r["relation"], r["object"]) for r in rows_of(dump)] == [
        (None, "__HIVE_DEFAULT_PARTITION__"),
        ("capital", "capital"),
        ("head of", "head%20of"),
    ]
    assert rows_of(open_dump(f"{tmp_path}/d/*/part.parquet")) == rows_of(dump)


def test_a_folder_that_is_spelled_out_is_no_column(write):
    dump = open_dump(write([fact()], "day=23/dump.parquet"))
    assert set(dump.types) == set(FACT)


def test_dictionaries_are_decoded_and_types_put_together(write, tmp_path):
    encoded = pa.table({name: pa.array(["a"]).dictionary_encode() for name in FACT})
    write(encoded.append_column("n", pa.array([1])), "d/1.parquet")
    write([fact(n=0.5, more=True)], "d/2.parquet")
    batches = list(open_dump(f"{tmp_path}/d").aligned_batches())
    assert [batch.first for batch in batches] == [0, 1]
    assert batches[0].table.schema == batches[1].table.schema
    assert [b.table.to_pylist()[0] for b in batches] == [
        fact("a", "a", "a", n=1.0, more=None),
        fact(n=0.5, more=True),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "has no column subject; a fact dump needs subject, relation, object, and this file"),
        ({"subject": "who"}, "has no column who; a fact dump needs"),
        ({"subject": "relation"}, "--column: relation is mapped to two columns"),
        ({"subject": "entity", "source": "entity"}, "--column: entity is mapped to two columns"),
        ({"subjekt": "entity"}, "--column subjekt: a dump has no such column; use one of subject"),
    ],
)
def test_a_missing_column_is_named(write, columns, message):
    path = write([{"entity": "A", "relation": "r", "object": "o"}])
    with pytest.raises(FactDumpError) as caught:
        open_dump(path, columns)
    assert message in str(caught.value)


def test_two_columns_of_one_name_are_refused(write):
    twice = pa.table([pa.array(["a"])] * 4, names=[*FACT, "subject"])
    with pytest.raises(FactDumpError, match="two columns named 'subject'"):
        open_dump(write(twice))


@pytest.mark.parametrize("keep", [0, 300, -1])
def test_a_truncated_file_is_named(write, keep):
    path = Path(write([fact(str(i)) for i in range(100)]))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FactDumpError, match=rf"fact dump: cannot read {path} \(.*damaged or not"):
        open_dump(str(path))
    assert [path.name in text for text in open_dump(str(path), keep_damaged=True).damaged] == [True]


def damage_pages(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[4:200] = b"\xaa" * 196
    Path(path).write_bytes(data)


def test_damaged_pages_are_named_and_other_files_still_read(write, tmp_path):
    bad = write([fact(str(i)) for i in range(1000)], "d/1.parquet")
    write([fact("good")], "d/2.parquet")
    damage_pages(bad)
    dump = open_dump(f"{tmp_path}/d")
    with pytest.raises(FactDumpError, match=rf"fact dump: cannot read {bad} \("):
        rows_of(dump)
    damaged = []
    read = [(b.first, b.table.num_rows) for b in dump.batches(FACT, damaged)]
    assert (read, len(damaged)) == ([(1000, 1)], 1)


def test_a_file_that_two_patterns_reach_is_read_once(write):
    path = write([fact()])
    assert open_dump([path, path]).rows == 1


def test_batches_are_small_whatever_the_row_groups(write, monkeypatch, tmp_path):
    monkeypatch.setattr("jobs.facts.dump.files.BATCH_ROWS", 10)
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({name: ["x"] * 35 for name in FACT}), path, row_group_size=35)
    sizes = [len(batch.table) for batch in open_dump(str(path)).batches(FACT)]
    assert (max(sizes), sum(sizes)) == (10, 35)
