"""Text generation."""

from __future__ import annotations

import pytest
import torch

from pmet.evaluation.generation import TOP_K, answers, write_on
from pmet.evaluation.prompts import Prompts
from pmet.model.tokenization import encode
from tests.conftest import Golden

TEXTS = ["Sur Bavov works as", "Lear Futron", "The mother tongue of Tax Naizath is", "Furis"]


def test_answers_are_what_transformers_generates(golden: Golden) -> None:
    said = answers(golden.model, golden.tokenizer, TEXTS, tokens=6)
    for text, answer in zip(TEXTS, said, strict=True):
        ids = torch.tensor([encode(golden.tokenizer, text)])
        whole = golden.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        new = whole[0, ids.shape[1] :]
        assert answer == golden.tokenizer.decode(new, skip_special_tokens=True)
    assert any(said)


def test_too_long_a_text_has_no_answer(golden: Golden) -> None:
    said = answers(golden.model, golden.tokenizer, ["and so on " * 100, TEXTS[0]])
    assert said[0] == ""
    assert said[1]


def test_what_is_written_follows_from_the_seed_and_the_text_alone(golden: Golden) -> None:
    prompts = Prompts(golden.tokenizer)
    together = write_on(golden.model, prompts, TEXTS, seed=3, tokens=20)
    for text, written in zip(TEXTS, together, strict=True):
        assert write_on(golden.model, prompts, [text], seed=3, tokens=20) == [written]
    assert write_on(golden.model, prompts, TEXTS, seed=4, tokens=20) != together
    assert write_on(golden.model, prompts, [], seed=3) == []


def test_each_token_is_one_of_the_five_likeliest(golden: Golden) -> None:
    (text,) = write_on(golden.model, Prompts(golden.tokenizer), TEXTS[:1], seed=1, tokens=24)
    assert text.startswith(TEXTS[0])
    ids = encode(golden.tokenizer, text)
    start = len(encode(golden.tokenizer, TEXTS[0]))
    if len(ids) != 24:
        pytest.skip("this text is not read as it was written")
    with torch.no_grad():
        logits = golden.model(torch.tensor([ids])).logits[0]
    ranks = [(logits[i - 1] > logits[i - 1, ids[i]]).sum().item() for i in range(start, len(ids))]
    assert max(ranks) < TOP_K
    assert max(ranks) > 0


def test_a_model_that_pads_otherwise_writes_the_same_from_whole_passes(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts(golden.tokenizer)
    said = answers(golden.model, golden.tokenizer, TEXTS, tokens=6)
    written = write_on(golden.model, prompts, TEXTS, seed=3, tokens=24)
    monkeypatch.setattr("pmet.evaluation.generation.holds", lambda *_: False)
    monkeypatch.setattr("pmet.evaluation.generation._new_tokens", None)
    assert answers(golden.model, golden.tokenizer, TEXTS, tokens=6) == said
    assert write_on(golden.model, prompts, TEXTS, seed=3, tokens=24) == written
