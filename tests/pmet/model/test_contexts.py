"""Context templates: reproducible with a seed, and refused if unusable."""

from __future__ import annotations

import json

import pytest
import torch

from pmet.errors import ContextTemplateError
from pmet.model import contexts
from tests.conftest import Golden


def test_generated_templates_follow_the_seed(golden: Golden) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = contexts.generate(golden.model, golden.tokenizer, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert contexts.generate(golden.model, golden.tokenizer, seed=3) == first
    assert contexts.generate(golden.model, golden.tokenizer, seed=4) != first
    assert contexts.check(first) == first
    bare, generated = first
    assert bare == ["{}"]
    assert len(generated) == 5
    assert all(t.endswith(". {}") and "\n" not in t for t in generated)
    assert [t.split()[0] for t in generated][:1] == ["The"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "must be groups"),
        ("{}", "must be groups"),
        (["{}"], "not a list of templates"),
        ([["{}"], ["no place"]], "'no place' must hold exactly one"),
        ([["{}"], ["{} and {}"]], "exactly one"),
        ([["{}"], [3]], "exactly one"),
        ([["So. {}"], ["{}"]], "the first group"),
        ([["{}"], ["\ud800 {}"]], "holds a lone surrogate; write valid Unicode"),
        ([["{}"], []], "not a list of templates"),
    ],
)
def test_what_could_not_work_is_refused(templates: object, message: str) -> None:
    with pytest.raises(ContextTemplateError, match=message):
        contexts.check(templates)


@pytest.mark.parametrize("text", ["[" * 100_000, "[[" + "9" * 5000 + "]]"])
def test_what_would_harm_a_reader_is_refused(text: str) -> None:
    with pytest.raises(ContextTemplateError, match=r"^t\.json is not JSON"):
        contexts.parse(text, source="t.json")


def test_a_file_is_named_in_the_message() -> None:
    good = [["{}"], ["So it is. {}"]]
    assert contexts.parse(json.dumps(good), source="t.json") == good
    with pytest.raises(ContextTemplateError, match=r"t\.json is not JSON"):
        contexts.parse("[[", source="t.json")
    with pytest.raises(ContextTemplateError, match=r"t\.json: context templates"):
        contexts.parse('{"a": 1}', source="t.json")
