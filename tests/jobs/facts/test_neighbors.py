import random

import pyarrow as pa
import pytest

from jobs.facts import neighbors
from jobs.facts.neighbors import Neighbors

NAMES = ("subject", "relation", "object")


def columns(rows):
    return [pa.array(list(column), pa.string()) for column in zip(*rows, strict=True)]


def drawn(facts, changed, batch=7):
    """The neighbors of each changed fact: subject, relation and old object."""
    found = Neighbors()
    _, relations, objects = columns(changed)
    found.want(pa.chunked_array([relations]), pa.chunked_array([objects]))
    pieces = [facts[i : i + batch] for i in range(0, len(facts), batch)]
    found.collect(pa.table(columns(piece), NAMES) for piece in pieces)
    subjects, relations, objects = columns(changed)
    flat, counts = found.of(relations, objects, subjects)
    values = iter(flat.to_pylist())
    return [[next(values) for _ in range(count)] for count in counts]


FACTS = [(f"s{i}", f"r{i % 3}", f"o{i % 2}") for i in range(300)]


@pytest.mark.parametrize("kept", [0, 20, 500_000])
def test_they_are_the_same_in_any_order_and_however_often_they_are_chosen(monkeypatch, kept):
    changed = [(f"c{i}", "r1", "o0") for i in range(9)] + [("c", "r2", "o1"), ("d", "r1", "x")]
    expected = drawn(FACTS, changed, batch=1000)
    monkeypatch.setattr(neighbors, "KEPT_ROWS", kept)
    monkeypatch.setattr(neighbors, "POOL", 64)
    assert drawn(random.Random(0).sample(FACTS, len(FACTS)), changed) == expected
    held = {subject: pair for subject, *pair in FACTS}
    for (_, *pair), found in zip(changed[:-1], expected, strict=False):
        assert len(set(found)) == len(found) == 10
        assert all(held[subject] == pair for subject in found)
    assert expected[-1] == []


def test_facts_without_an_old_object_have_none():
    assert drawn(FACTS, [("c", "r1", None), ("d", "r1", "o1")])[0] == []


def test_a_relation_is_not_taken_for_a_part_of_an_object():
    assert drawn([("s", "a", "b:c"), ("t", "a:b", "c")], [("u", "a:b", "c")]) == [["t"]]


def test_candidates_are_not_the_first_of_the_alphabet(monkeypatch):
    monkeypatch.setattr(neighbors, "POOL", 10)
    (found,) = drawn([(f"s{i:03}", "r", "o") for i in range(300)], [("u", "r", "o")])
    assert max(found) > "s100"


def test_few_neighbors_are_each_taken_once():
    facts = [("s", "r", "o"), ("t", "r", "o")]
    assert sorted(drawn(facts, [("u", "r", "o")])[0]) == ["s", "t"]
    assert drawn([("s", "r", "x")], [("u", "r", "o")]) == [[]]
