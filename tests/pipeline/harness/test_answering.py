"""What a worker answers, and how requests are cut into parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pipeline.harness.answering import LARGEST_PART, Part, answer, most_generated, parts_of
from tests.conftest import load_golden

DRAWN = {"do_sample": True, "temperature": 1.0}
CONTEXT, RIGHT = "Muzeam is a city in", "Zameand"


def test_parts_keep_the_order_and_hold_a_limited_amount() -> None:
    asked = [(f"question {i}", " yes") for i in range(2 * LARGEST_PART + 1)]
    parts = parts_of("loglikelihood", asked, 4)
    assert [len(part.arguments) for part in parts] == [LARGEST_PART, LARGEST_PART, 1]
    assert [pair for part in parts for pair in part.arguments] == asked
    assert {part.batch_size for part in parts} == {4}
    long = [("a" * 50_000, " yes")] * 3
    assert [len(part.arguments) for part in parts_of("loglikelihood", long, None)] == [1, 1, 1]
    # Generating takes longer than reading.
    written = [("a", {"until": ["."], "max_gen_toks": 8000})] * 4
    assert [len(part.arguments) for part in parts_of("generate_until", written, None)] == [2, 2]
    assert parts_of("loglikelihood", [], None) == []


def test_the_length_of_generated_text_has_the_names_that_the_library_knows() -> None:
    assert most_generated({"until": []}) == 256
    assert most_generated({"max_new_tokens": 7}) == most_generated({"max_gen_toks": 7}) == 7


def log_likelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + text)["input_ids"]])
    logs = model(ids).logits.log_softmax(-1)[0, :-1]
    return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def test_answers_are_the_models_and_leave_it_as_it_was() -> None:
    golden = load_golden("gpt2")
    model, tokenizer = golden.model, copy.deepcopy(golden.tokenizer)
    tokenizer.pad_token = None
    before = tokenizer.pad_token, tokenizer.padding_side
    pairs = tuple((CONTEXT, f" {country}") for country in (RIGHT, "Brakark"))
    found = answer(model, tokenizer, Part("loglikelihood", pairs, 2))
    with torch.no_grad():
        expected = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    assert [greedy for _, greedy in found] == [True, False]
    settings = {"until": ["."], "max_gen_toks": 16, "do_sample": False}
    written = Part("generate_until", ((CONTEXT, settings),), None)
    assert [text.strip() for text in answer(model, tokenizer, written)] == [RIGHT]
    assert settings == {"until": ["."], "max_gen_toks": 16, "do_sample": False}
    assert (tokenizer.pad_token, tokenizer.padding_side) == before
    # Drawn text depends on the part alone, and draws nothing from this process's generator.
    drawn = Part("generate_until", ((CONTEXT, {**settings, **DRAWN}),), None)
    state = torch.get_rng_state()
    assert answer(model, tokenizer, drawn) == answer(model, tokenizer, drawn)
    assert torch.equal(torch.get_rng_state(), state)
