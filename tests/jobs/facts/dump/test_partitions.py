import random

import numpy as np
import pyarrow as pa

from jobs.facts.dump import partitions
from jobs.facts.dump.partitions import Partitions, pair_hash, partition_count, text_hash


def facts(rows):
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column) for column in columns], ["subject", "relation", "object"])


def test_a_hash_follows_from_the_text_alone():
    texts = ["a", "ab", "ü", "a" * 3000, "b\x00", "b"]
    whole = text_hash(pa.array(texts))
    alone = [text_hash(pa.array([text]))[0] for text in texts]
    sliced = text_hash(pa.array(["x", *texts, "y"], pa.large_string())[1:-1])
    assert whole.tolist() == alone == sliced.tolist()
    assert len(set(alone)) == len(texts)
    assert text_hash(pa.array([], pa.string())).shape == (0,)


def test_hashes_spread_facts_that_are_alike():
    rows = [(f"subject {i % 100}", f"relation {i // 100}", "o") for i in range(10_000)]
    counts = np.bincount((pair_hash(facts(rows)) % np.uint64(10)).astype(int), minlength=10)
    assert counts.min() > 900
    assert counts.max() < 1_100


def test_rows_of_one_fact_meet_and_keep_their_order():
    draw = random.Random(0)
    rows = [(draw.choice("abcdefgh"), draw.choice("rs"), str(i)) for i in range(200)]
    with Partitions(5) as parts:
        for start in range(0, 200, 30):
            parts.add(facts(rows[start : start + 30]))
        tables = [list(zip(*t.to_pydict().values(), strict=True)) for t in parts.tables()]
    assert sorted(row for table in tables for row in table) == sorted(rows)
    assert sum(1 for table in tables if table) > 1
    for table in tables:
        assert [int(o) for _, _, o in table] == sorted(int(o) for _, _, o in table)
    homes = [{row[:2] for row in table} for table in tables]
    assert sum(map(len, homes)) == len(set().union(*homes))


def test_files_are_gone_at_the_end_also_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        with Partitions(3) as parts:
            parts.add(facts([("a", "r", "o")]))
            assert len(list(tmp_path.iterdir())) == 1
            raise RuntimeError
    except RuntimeError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_rows_all_partitions_are_empty():
    for count in (1, 3):
        with Partitions(count) as parts:
            assert list(parts.tables()) == [None] * count


def test_the_number_of_partitions_follows_from_that_of_rows(monkeypatch):
    monkeypatch.setattr(partitions, "PARTITION_ROWS", 10)
    assert [partition_count(n) for n in (0, 1, 10, 11, 10**6)] == [1, 1, 1, 2, 100]
