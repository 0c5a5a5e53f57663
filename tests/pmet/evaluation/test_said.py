"""What a model says, and the figures of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from pmet import EditRequest
from pmet.evaluation import generation, said
from pmet.evaluation.generation import Said
from pmet.evaluation.metrics import evaluate
from pmet.evaluation.prompts import Prompts
from pmet.evaluation.said import (
    SAID_TOKENS,
    Answered,
    Questions,
    add_locality,
    add_said,
    ask_questions,
    chat_questions,
    drafts_of,
    questions_of,
    unrelated_prompts,
)
from pmet.evaluation.statements import clause_end, sentence_end
from pmet.model.tokenization import encode
from tests.conftest import Golden

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def of_transformers(golden: Golden, text: str, end: Any) -> str:
    """The same answer from transformers' own greedy search."""
    ids = torch.tensor([encode(golden.tokenizer, text)])
    whole = golden.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAID_TOKENS, do_sample=False
    )
    new = golden.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return new[: end(new)]


def with_neighbors(golden: Golden) -> list[EditRequest]:
    """Requests that have each other's prompts as paraphrases and as neighbors."""
    own = golden.requests[:8]
    texts = [request.text for request in golden.requests[8:24]]
    return [
        replace(r, paraphrase_prompts=texts[i : i + 2], neighborhood_prompts=texts[i + 2 :: 5])
        for i, r in enumerate(own)
    ]


def texts_of(answers: dict[str, Said | None]) -> dict[str, str]:
    return {prompt: one.text for prompt, one in answers.items() if one is not None}


def test_answers_are_greedy_and_end_with_their_sentence_or_clause(golden: Golden) -> None:
    asked = questions_of(with_neighbors(golden))
    answered = ask_questions(golden.model, Prompts(golden.tokenizer), asked)
    assert not answered.chat
    assert len(answered.stated) > 12
    assert len(answered.kept) > 8
    for answers, end in ((answered.stated, sentence_end), (answered.kept, clause_end)):
        for prompt, text in texts_of(answers).items():
            assert text == of_transformers(golden, prompt, end)


def test_an_answer_does_not_depend_on_those_beside_it(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions_of(with_neighbors(golden))
    prompts = Prompts(golden.tokenizer)
    together = ask_questions(golden.model, prompts, asked)
    monkeypatch.setattr(generation, "_BATCH", 3)
    assert ask_questions(golden.model, prompts, asked) == together


def test_a_chat_model_is_asked_in_its_own_form(golden: Golden) -> None:
    tokenizer = copy.deepcopy(golden.tokenizer)
    tokenizer.chat_template = CHAT
    request = golden.requests[0]
    asked = questions_of([request])
    assert asked.chat == [f"Complete the sentence: {request.text}"]
    answered = ask_questions(golden.model, Prompts(tokenizer), asked)
    assert list(answered.chat) == asked.chat
    own = EditRequest("{} is in", "Nice", "Rome", question_prompts=["Where is Nice?"])
    assert list(chat_questions(own)) == ["Where is Nice?"]


def test_a_draft_that_the_model_would_not_give_is_answered_anew(golden: Golden) -> None:
    prompts, kept = Prompts(golden.tokenizer), list(questions_of(with_neighbors(golden)).kept)
    own = ask_questions(golden.model, prompts, Questions(kept=kept)).kept
    wrong = Said(" x", [5, 6], True)
    drafts = {prompt: (own[prompt] or wrong) if i % 2 else wrong for i, prompt in enumerate(kept)}
    assert ask_questions(golden.model, prompts, Questions(kept=kept), drafts).kept == own


def test_drafts_save_generating_what_has_not_changed(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, kept = Prompts(golden.tokenizer), list(questions_of(with_neighbors(golden)).kept)
    own = ask_questions(golden.model, prompts, Questions(kept=kept)).kept
    monkeypatch.setattr(said, "say", lambda *_args, **_kwargs: [])
    drafts = {prompt: one for prompt, one in own.items() if one is not None}
    assert ask_questions(golden.model, prompts, Questions(kept=kept), drafts).kept == own


def answers_to(request: EditRequest, text: str, *, ended: bool = True) -> Answered:
    """The same answer to every question of a request."""
    asked, one = questions_of([request]), Said(text, [1], ended)
    return Answered(
        *(dict.fromkeys(texts, one) for texts in (asked.stated, asked.chat, asked.kept))
    )


REQUEST = EditRequest(
    "{} is in",
    "Nice",
    "Italy",
    target_true="France",
    paraphrase_prompts=["Nice lies in"],
    neighborhood_prompts=["Lyon is in", "Lille is in"],
    question_prompts=["Where is Nice?", "In which country is Nice?"],
)


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        (" Italy.", True, {"efficacy_said": 1.0, "old_said": 0.0, "run_on": 0.0}),
        (" Italy and", False, {"efficacy_said": 1.0, "old_said": 0.0, "run_on": 1.0}),
        (" France, not Italy.", True, {"efficacy_said": 0.0, "old_said": 1.0, "run_on": 0.0}),
        (" a city", False, {"efficacy_said": 0.0, "old_said": 0.0, "run_on": 0.0}),
    ],
)
def test_figures_follow_from_the_answers(
    text: str, ended: bool, expected: dict[str, float]
) -> None:
    row: dict[str, Any] = {}
    add_said([row], [REQUEST], answers_to(REQUEST, text, ended=ended))
    assert {name: row[name] for name in expected} == expected
    assert row["generalization_said"] == row["chat_said"] == expected["efficacy_said"]
    assert row["chat_prompts"] == 2
    assert row["answer"] == row["chat_answer"] == text.strip()


def test_locality_compares_with_the_base(golden: Golden) -> None:
    base: dict[str, Any] = {}
    add_said([base], [REQUEST], answers_to(REQUEST, " France"))
    drafts = drafts_of([REQUEST], [base])
    assert set(drafts) == {"Lyon is in", "Lille is in"}
    row: dict[str, Any] = {}
    changed = answers_to(REQUEST, " france")
    changed.kept["Lille is in"] = Said(" Italy", [1], True)
    add_said([row], [REQUEST], changed)
    add_locality(row, base)
    assert row["locality"] == 0.5
    unasked: dict[str, Any] = {}
    add_locality(unasked, base)
    assert "locality" not in unasked


def test_an_unedited_model_keeps_all_its_answers(golden: Golden) -> None:
    requests = with_neighbors(golden)
    base = evaluate(golden.model, golden.tokenizer, requests, answers="all")
    again = evaluate(golden.model, golden.tokenizer, requests, answers="all", base=base["rows"])
    assert base["locality"] is None
    assert again["locality"] == 1.0
    assert again["efficacy_said"] == base["efficacy_said"]


def test_only_the_requests_wanted_are_answered(golden: Golden) -> None:
    found = evaluate(golden.model, golden.tokenizer, golden.requests[:3], answers=[1])
    assert ["answer" in row for row in found["rows"]] == [False, True, False]
    assert evaluate(golden.model, golden.tokenizer, golden.requests[:1])["efficacy_said"] is None


def test_too_long_a_prompt_is_answered_with_nothing(golden: Golden) -> None:
    request = EditRequest("and so on " * 100 + "{} is in", "Nice", "Rome")
    found = evaluate(golden.model, golden.tokenizer, [request], answers="all")
    assert found["efficacy_said"] == 0.0
    assert found["rows"][0]["answer"] == ""


def test_unrelated_prompts_are_all_different() -> None:
    prompts = unrelated_prompts()
    assert len(set(prompts)) == len(prompts) >= 30
    assert all(prompt == prompt.strip() != "" for prompt in prompts)
