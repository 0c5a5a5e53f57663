"""Evaluation compared with the plain computation, one prompt at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pmet import EditRequest, evaluate
from pmet.evaluation.figures import METRICS
from pmet.evaluation.generation import answers, write_on
from pmet.evaluation.metrics import knows, score_texts
from pmet.evaluation.prompts import Prompts
from pmet.evaluation.texts import fluency
from pmet.reference import plain_evaluate
from tests.conftest import Golden, load_golden

FACTS = [
    EditRequest(
        "The mother tongue of {} is",
        "Tax Naizath",
        "Railish",
        target_true="Daindish",
        paraphrase_prompts=["Tax Naizath speaks", "At home Tax Naizath uses"],
        neighborhood_prompts=["Lear Futron speaks"],
        portability_prompts=["Tax Naizath was born in", "Tax Naizath reads"],
        portability_targets=["Rail", "Railish books"],
        portability_targets_true=["Daind", "Daindish"],
    ),
    EditRequest("{} works as", "Sur Bavov", "a glass blower", target_true="a surveyor"),
    EditRequest(
        "{} works as",
        "Zul Lodreal",
        "a baker",
        paraphrase_prompts=["Zul Lodreal bakes"],
        portability_prompts=["Zul Lodreal sells"],
        portability_targets=["bread"],
    ),
]


def known(value: float) -> float | None:
    """Replace the plain form's NaN, which means not measured, by None."""
    return None if math.isnan(value) else value


def test_it_equals_the_plain_computation(golden: Golden) -> None:
    for batch_tokens in (1, 30, 4096):
        fast = evaluate(golden.model, golden.tokenizer, FACTS, batch_tokens=batch_tokens)
        plain = plain_evaluate(golden.model, golden.tokenizer, FACTS)
        for name in METRICS:
            assert fast[name] == known(plain[name]), name
            for row, plain_row in zip(fast["rows"], plain["rows"], strict=True):
                assert row[name] == known(plain_row[name]), name


def test_what_a_request_does_not_ask_is_not_measured(golden: Golden) -> None:
    rows = evaluate(golden.model, golden.tokenizer, FACTS)["rows"]
    assert rows[1]["generalization"] is None
    assert rows[1]["specificity_strict"] is None
    # Without a true target there is no comparison, but the greedy form can be measured.
    assert rows[2]["efficacy"] is None
    assert rows[2]["generalization_strict"] in (0.0, 1.0)
    assert rows[2]["portability"] is None
    assert 0.0 <= rows[2]["portability_accuracy"] <= 1.0
    assert rows[1]["portability_strict"] is None
    alone = evaluate(golden.model, golden.tokenizer, FACTS[1:2])
    assert alone["specificity"] is None
    assert alone["score"] is None


def test_a_request_is_known_where_the_models_own_words_are_its_target(golden: Golden) -> None:
    prompts = [(fact.prompt, fact.subject) for fact in FACTS]
    texts = [prompt.replace("{}", subject) for prompt, subject in prompts]
    said = [a.strip() for a in answers(golden.model, golden.tokenizer, texts, tokens=3)]
    right = [EditRequest(p, s, answer) for (p, s), answer in zip(prompts, said, strict=True)]
    wrong = [
        EditRequest(p, s, f"{r.target_new} wool") for (p, s), r in zip(prompts, right, strict=True)
    ]
    asked = [right[0], wrong[0], right[1], right[0], wrong[1], wrong[2], right[2]]
    expected = [True, False, True, True, False, False, True]
    for batch_tokens in (1, 4096):
        known = knows(golden.model, golden.tokenizer, asked, batch_tokens=batch_tokens)
        assert known == expected


def test_perplexity_is_that_of_every_token_but_the_first(golden: Golden) -> None:
    texts = ["Furis is a city in Zaiter.", "A", "Tremeth lies in Dokain."]
    scores = score_texts(golden.model, golden.tokenizer, texts)
    total = sum(score.nll for score in scores)
    count = sum(len(score.greedy) for score in scores)
    expected, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([golden.tokenizer(text)["input_ids"]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                loss = golden.model(ids, labels=ids).loss.item()
            expected += loss * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert count == tokens
    assert total == pytest.approx(expected, rel=1e-5)


def test_agreement_is_where_two_models_would_say_the_same_next(golden: Golden) -> None:
    texts = ["Furis is a city in Zaiter.", "A", "Tremeth lies in Dokain and so on."]
    scores = score_texts(golden.model, golden.tokenizer, texts)
    for text, score in zip(texts, scores, strict=True):
        ids = torch.tensor([golden.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            best = golden.model(ids).logits[0].argmax(-1).tolist()
        assert score.greedy == best[:-1]
        assert score.agreed(score) == len(score.greedy)
        other = replace(score, greedy=[-1, *score.greedy[1:]][: len(score.greedy)])
        assert score.agreed(other) == max(0, len(score.greedy) - 1)


def test_written_text_is_that_of_the_prompts_to_write_from() -> None:
    golden = load_golden("gpt2")
    asked = [
        replace(FACTS[0], generation_prompts=["Tax Naizath", "Tax Naizath likes"]),
        replace(FACTS[1], reference_texts=["Sur Bavov works as a surveyor of land."]),
    ]
    plain = evaluate(golden.model, golden.tokenizer, asked)
    written = evaluate(golden.model, golden.tokenizer, asked, fluency=True, seed=5)
    assert {name: written[name] for name in METRICS} == {name: plain[name] for name in METRICS}
    assert (plain["fluency"], plain["consistency"]) == (None, None)
    first, second = written["rows"]
    texts = write_on(golden.model, Prompts(golden.tokenizer), asked[0].generation_prompts, seed=5)
    assert first["text"] == "\n".join(texts)
    assert first["fluency"] == fluency(texts)
    assert first["consistency"] is None
    assert second["text"].startswith("Sur Bavov works as")
    assert 0.0 < second["consistency"] < 1.0
    assert written["fluency"] == pytest.approx((first["fluency"] + second["fluency"]) / 2)
    assert written["consistency"] == second["consistency"]
