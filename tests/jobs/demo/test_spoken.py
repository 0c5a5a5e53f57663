"""The world in everyday words: which facts are asked for, and which requests change them."""

from __future__ import annotations

from collections import Counter

from jobs.demo.spoken import (
    ASKED,
    MOST_NEIGHBORS,
    candidates,
    question_of,
    requests_among,
    spoken,
    statements,
)
from pmet.request import EditRequest


def test_every_text_has_a_place_for_the_subject_which_never_comes_first() -> None:
    for relation in spoken().values():
        for text in (relation.prompt, *relation.paraphrases, relation.question):
            assert text.count("{}") == 1
            assert not text.startswith("{}")
        assert relation.question.endswith("?")
        assert len({relation.prompt, *relation.paraphrases}) == 3


def test_some_facts_of_each_relation_are_asked_for() -> None:
    count = Counter(fact.relation.name for fact in candidates())
    assert set(count) == set(spoken())
    assert max(count.values()) == ASKED
    assert candidates(1) != candidates(0) == candidates(0)


def test_requests_change_what_is_known() -> None:
    known = candidates()[::2]
    rows = requests_among(known, 40)
    assert len(rows) == 40
    by_question = {question_of(fact): fact for fact in known}
    edited = {row["subject"] for row in rows}
    assert len(edited) == 40
    for row in rows:
        prompt = row["prompt"].replace("{}", row["subject"])
        fact = by_question[prompt, row["target_true"]]
        assert row["target_new"] != row["target_true"]
        others = {f.object for f in known if f.relation == fact.relation}
        assert row["target_new"] in others
        assert len(row["neighborhood_prompts"]) <= MOST_NEIGHBORS
        for neighbor in row["neighborhood_prompts"]:
            other = by_question[neighbor, row["target_true"]]
            assert other.subject not in edited
        EditRequest(**{k: v for k, v in row.items() if k != "relation"})
    assert len({row["relation"] for row in rows}) > 8
    assert any(row["neighborhood_prompts"] for row in rows)


def test_fewer_known_facts_give_fewer_requests() -> None:
    assert requests_among([], 40) == []
    alone = [fact for fact in candidates() if fact.relation.name == "continent"][:2]
    same = [fact for fact in alone if fact.object == alone[0].object]
    # Nothing to change to.
    assert requests_among(same[:1], 40) == []


def test_statements_leave_edited_subjects_out() -> None:
    every = statements([])
    some = statements(["France"])
    assert "The capital city of France is Paris." in every
    assert not any("of France is" in text for text in some)
    assert len(some) < len(every)
