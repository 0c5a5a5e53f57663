"""Edit requests: answers correspond to their prompts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmet.errors import RequestError
from pmet.request import EditRequest, trimmed_prompt


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"portability_prompts": ["a b"]}, "portability_targets has 0 texts for 1 portability_pr"),
        ({"portability_targets": ["a"]}, "portability_targets has 1 texts for 0 portability_pro"),
        (
            {
                "portability_prompts": ["a b", "c"],
                "portability_targets": ["d", "e"],
                "portability_targets_true": ["f"],
            },
            "portability_targets_true has 1 texts for 2 portability_prompts; give one for each",
        ),
        ({"reference_texts": [" "]}, r"reference_texts\[0\] is empty; give text"),
        ({"generation_prompts": "text"}, "generation_prompts is str; give a list of strings"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        EditRequest("{} is", "A", "B", **given)


def test_the_true_answers_may_be_unknown() -> None:
    request = EditRequest(
        "{} is", "A", "B", portability_prompts=["a b "], portability_targets=[" c"]
    )
    assert request.portability_prompts == ("a b",)
    assert request.portability_targets == ("c",)
    assert request.portability_targets_true == ()


CHAT = "<|user|>\n{} speaks?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (CHAT, CHAT),
        ("\n\nHuman: {}?\n\nAssistant: \r\n ", "\n\nHuman: {}?\n\nAssistant: \r\n "),
        (" {} is\t ", "{} is"),
        ("  {} is\n", "{} is\n"),
        ("\n {} is  ", "\n {} is"),
    ],
)
def test_line_breaks_around_a_prompt_are_kept_and_other_white_space_is_not(
    written: str, kept: str
) -> None:
    texts = [written.replace("{}", "A")]
    request = EditRequest(
        written,
        " A\n",
        "B\n",
        target_true="\nC",
        paraphrase_prompts=texts,
        neighborhood_prompts=texts,
        generation_prompts=texts,
        portability_prompts=texts,
        portability_targets=["D\n"],
        reference_texts=["E\n"],
    )
    assert (request.prompt, request.subject, request.target_new) == (kept, "A", "B")
    assert request.text == kept.replace("{}", "A")
    assert request.text[slice(*request.subject_span)] == "A"
    for name in ("paraphrase", "neighborhood", "generation", "portability"):
        prompts = f"{name}_prompts"
        assert getattr(request, prompts) == (kept.replace("{}", "A"),)
    assert (request.target_true, request.portability_targets) == ("C", ("D",))
    assert request.reference_texts == ("E",)


@given(text=st.text(max_size=12))
def test_a_prompt_is_trimmed_once_and_never_inside(text: str) -> None:
    trimmed = trimmed_prompt(text)
    assert trimmed_prompt(trimmed) == trimmed
    assert trimmed in text
    assert trimmed.strip() == text.strip()
    if not {"\n", "\r"} & set(text):
        assert trimmed == text.strip()
