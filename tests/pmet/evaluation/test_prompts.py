"""Prompts as plain text and as chat turns."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pmet.errors import InputError
from pmet.evaluation.metrics import evaluate
from pmet.evaluation.prompts import Prompts
from pmet.model.tokenization import encode, tokenize_continuation
from pmet.request import EditRequest
from tests.conftest import load_golden

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
PAIRS = [("Sur Bavov works as", "a surveyor"), ("Lear Futron speaks", "Railish")]


@pytest.fixture(scope="module")
def chatting() -> Any:
    """The golden tokenizer with a chat template."""
    tokenizer = copy.deepcopy(load_golden("gpt2").tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_plain_continuations_are_those_of_an_edit(golden_tokenizer: Any) -> None:
    found = Prompts(golden_tokenizer).continuations(PAIRS)
    for pair, (prompt, target) in zip(PAIRS, found, strict=True):
        assert prompt == encode(golden_tokenizer, pair[0])
        assert target == tokenize_continuation(golden_tokenizer, *pair)


def test_after_a_line_break_no_space_stands_in_front_of_an_answer(golden_tokenizer: Any) -> None:
    pairs = [("Q: Who is Lear?\nA:\n", "Railish"), PAIRS[0]]
    ((prompt, target), other) = Prompts(golden_tokenizer).continuations(pairs)
    assert prompt + target == encode(golden_tokenizer, "".join(pairs[0]))
    assert target == tokenize_continuation(golden_tokenizer, *pairs[0])
    assert other == Prompts(golden_tokenizer).continuations(PAIRS)[0]


def test_in_a_chat_the_answer_follows_the_turn_without_a_space(chatting: Any) -> None:
    ((prompt, target), _) = Prompts(chatting, chat=True).continuations(PAIRS)
    assert chatting.decode(prompt) == "<user> Sur Bavov works as\n<answer>"
    assert chatting.decode(target) == "a surveyor"
    assert Prompts(chatting, chat=True).tokens([PAIRS[0][0]]) == [prompt]


def test_a_tokenizer_without_a_chat_is_refused(golden_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="has no chat template; leave chat_template out, or"):
        Prompts(golden_tokenizer, chat=True)


def test_a_model_is_asked_in_the_chat(chatting: Any) -> None:
    model = load_golden("gpt2").model
    asked = EditRequest("{} works as", "Sur Bavov", "a surveyor")
    figures = evaluate(model, chatting, [asked], chat_template=True, fluency=True)
    # As if the turn had been written out, except for the space.
    said = Prompts(chatting, chat=True).continuations([(asked.text, "a surveyor")])
    ids = [*said[0][0], *said[0][1]]
    best = model(load_ids(ids)).logits[0].argmax(-1).tolist()
    start = len(said[0][0])
    right = [best[i - 1] == ids[i] for i in range(start, len(ids))]
    assert figures["efficacy_accuracy"] == sum(right) / len(right)
    assert figures["rows"][0]["text"].startswith("Sur Bavov works as")


def load_ids(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])
