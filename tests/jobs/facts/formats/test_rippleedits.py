"""RippleEdits: facts inside sentences, and tests of what follows."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.facts.dataset import FORMATS
from jobs.facts.formats.record import RecordError
from jobs.facts.formats.rippleedits import edit, matches


def query(prompt: str, *answers: str, subject_id: str = "Q1", **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "answers": [{"value": value, "aliases": [f"{value}!"]} for value in answers],
        **{"query_type": "regular", "subject_id": subject_id, "relation": "MOTHER"},
        **more,
    }


def group(*queries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"test_queries": list(queries), "test_condition": "OR", "condition_queries": []}]


RECORD = {
    "example_type": "popular",
    "edit": {
        **{"prompt": "The name of the country of citizenship of Ada Quill is Marland."},
        **{"subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q9"},
        "previous_fact": {
            "prompt": "The name of the country of citizenship of Ada Quill is Norland.",
            **{"subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q8"},
        },
    },
    "Relation_Specifity": group(query("The name of the mother of Ada Quill is", "Bea")),
    "Forgetfulness": group(query("Ada Quill was first a citizen of", "Old Norland", "Norland")),
    "Logical_Generalization": group(query("The currency of Ada Quill's country is", "mar")),
    "Compositionality_I": group(query("The anthem of the country of Ada Quill is", "Rise")),
    "Compositionality_II": [],
    "Subject_Aliasing": group(query("The country of A. Quill is", "Marland"), query("x")),
}


def test_an_edit_with_its_tests() -> None:
    found = edit(RECORD, 5)
    assert found.request == {
        "prompt": "The name of the country of citizenship of {} is",
        "subject": "Ada Quill",
        "target_new": "Marland",
        "target_true": "Norland",
        "case_id": 5,
        "paraphrase_prompts": [],
        "neighborhood_prompts": ["Ada Quill was first a citizen of"],
        "portability_prompts": [
            "The currency of Ada Quill's country is",
            "The country of A. Quill is",
            "The anthem of the country of Ada Quill is",
        ],
        "portability_targets": ["mar", "Marland", "Rise"],
    }
    assert found.extra["relation"] == "COUNTRY_OF_CITIZENSHIP"
    assert found.extra["Relation_Specifity"] == RECORD["Relation_Specifity"]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The number of children Ada has is 3.", ("The number of children {} has is", "Ada", "3")),
        (
            "The name of the award Ada won is Prize of Honour.",
            ("The name of the award {} won is", "Ada", "Prize of Honour"),
        ),
        (
            "The name of the country which Old Tor is associated with is Marland.",
            ("The name of the country which {} is associated with is", "Old Tor", "Marland"),
        ),
        ("Storm follows Calm.", ("{} follows", "Storm", "Calm")),
        ("Part 2 is followed by Part 3.", ("{} is followed by", "Part 2", "Part 3")),
        (
            "The names of the siblings of Ada are Bo.",
            ("The names of the siblings of {} are", "Ada", "Bo"),
        ),
        (
            "The name of the position held by Ada is mayor of Brack.",
            ("The name of the position held by {} is", "Ada", "mayor of Brack"),
        ),
    ],
)
def test_sentences_are_divided(sentence: str, expected: tuple[str, str, str]) -> None:
    request = edit({"edit": {"prompt": sentence, "subject_id": "Q1"}}, 0).request
    assert tuple(request[name] for name in ("prompt", "subject", "target_new")) == expected


def test_tests_decide_where_the_subject_ends() -> None:
    ambiguous = {"prompt": "The author of What is Art is Bea.", "subject_id": "Q1"}
    with pytest.raises(RecordError, match="prompt, subject and target in 2 ways"):
        edit({"edit": ambiguous}, 0)
    beside = group(
        query("The editor of What is Art is", "Cy"), query("The x of Y is", "z", subject_id="Q2")
    )
    found = edit({"edit": ambiguous, "Forgetfulness": beside}, 0)
    assert found.request["subject"] == "What is Art"
    with pytest.raises(RecordError, match="in 0 ways"):
        edit({"edit": {"prompt": "It rains.", "subject_id": "Q1"}}, 0)


@pytest.mark.parametrize(
    "value", [None, 3, "x", [3], [{"test_queries": 3}], [{"test_queries": [3]}]]
)
@pytest.mark.parametrize("name", ["Forgetfulness", "Subject_Aliasing", "edit"])
def test_other_shapes_are_passed_over(name: str, value: Any) -> None:
    if name == "edit":
        with pytest.raises(RecordError, match=r"edit(.prompt)? is missing"):
            edit(RECORD | {"edit": value}, 0)
    else:
        assert edit(RECORD | {name: value}, 0).request["subject"] == "Ada Quill"


def test_it_is_told_from_other_formats() -> None:
    assert matches(RECORD)
    assert [f.name for f in FORMATS.values() if f.matches(RECORD)] == ["rippleedits"]
