"""Edit requests: answers go with their prompts."""

from __future__ import annotations

from typing import Any

import pytest

from pmet.errors import RequestError
from pmet.request import EditRequest


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
