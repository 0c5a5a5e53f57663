"""Batched continuations compared with single ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pmet.evaluation import continuations
from pmet.evaluation.continuations import Scored, score_continuations
from pmet.evaluation.generation import answers
from pmet.evaluation.prompts import Prompts
from tests.conftest import Golden, load_golden

PROMPT = "Sur Bavov works as"
# One is a prefix of another, and the prompt of one pair ends in another's target.
PAIRS = [
    (PROMPT, "a surveyor"),
    (PROMPT, "a"),
    (PROMPT, "a glass blower"),
    (f"{PROMPT} a", "baker"),
    ("Lear Futron speaks", "Railish"),
    ("Lear Futron speaks", "Daindish"),
]


def by_hand(golden: Golden, prompt: str, target: str) -> Scored:
    ids = golden.tokenizer(f"{prompt} {target}")["input_ids"]
    length = len(golden.tokenizer(f" {target}", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_probs = golden.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    at = range(len(ids) - length - 1, len(ids) - 1)
    mean = sum(log_probs[i, ids[i + 1]].item() for i in at) / length
    right = [log_probs[i].argmax().item() == ids[i + 1] for i in at]
    return Scored(mean, all(right), sum(right) / length)


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_pairs_that_share_a_pass_are_scored_as_each_by_itself(
    golden: Golden, batch_tokens: int
) -> None:
    told: list[int] = []
    scored = score_continuations(
        golden.model,
        Prompts(golden.tokenizer),
        [*PAIRS, PAIRS[0]],
        batch_tokens=batch_tokens,
        on_progress=told.append,
    )
    assert list(scored) == PAIRS or set(scored) == set(PAIRS)
    assert sum(told) == len(PAIRS)
    for pair, score in scored.items():
        expected = by_hand(golden, *pair)
        assert score.log_prob == pytest.approx(expected.log_prob, abs=1e-5)
        assert score[1:] == expected[1:], pair
    assert len({score.accuracy for score in scored.values()}) > 1


def test_a_prompt_is_read_once_for_all_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, tokens = load_golden("gpt2"), list[int]()
    original = continuations.logits_at

    def noted(model: Any, given: Any, *others: Any) -> torch.Tensor:
        tokens.append(given["input_ids"].numel())
        return original(model, given, *others)

    monkeypatch.setattr(continuations, "logits_at", noted)
    monkeypatch.setattr(continuations, "NEAR", 0.0)
    asked = [(PROMPT, "a"), (PROMPT, "the"), (PROMPT, "a surveyor"), (f"{PROMPT} a", "baker")]
    prompts = Prompts(golden.tokenizer)
    read = {prompt + target[:-1] for prompt, target in prompts.continuations(asked)}
    beginnings = {ids[:i] for ids in read for i in range(1, len(ids) + 1)}
    score_continuations(golden.model, prompts, asked)
    assert sum(tokens) == len(beginnings) < len(asked) * 3


@pytest.mark.parametrize("trees", [True, False])
def test_a_model_that_reads_no_trees_reads_rows(
    trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("gpt2")
    given: list[dict[str, Any]] = []
    original = continuations.logits_at

    def noted(model: Any, inputs: Any, *others: Any) -> torch.Tensor:
        given.append(inputs)
        return original(model, inputs, *others)

    monkeypatch.setattr(continuations, "logits_at", noted)
    monkeypatch.setattr(continuations, "reads_trees", lambda *_: trees)
    scored = score_continuations(golden.model, Prompts(golden.tokenizer), PAIRS)
    assert all("position_ids" in inputs for inputs in given) == trees
    for pair, score in scored.items():
        assert score.log_prob == pytest.approx(by_hand(golden, *pair).log_prob, abs=1e-5)


def test_what_hangs_on_rounding_is_computed_as_the_plain_form_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch with slightly wrong logits must not change a verdict, only find it close."""
    golden = load_golden("gpt2")
    prompts, (said,) = Prompts(golden.tokenizer), answers(golden.model, golden.tokenizer, [PROMPT])
    pairs = [*PAIRS, (PROMPT, said.strip().split()[0])]
    expected = {pair: by_hand(golden, *pair) for pair in pairs}
    original = continuations.logits_at

    def off(*arguments: Any) -> torch.Tensor:
        logits = original(*arguments)
        # Nearly flat: what was likelier no longer is, and no two differ by more than NEAR.
        return logits * -1e-7

    monkeypatch.setattr(continuations, "logits_at", off)
    scored = score_continuations(golden.model, prompts, pairs)
    for pair, score in scored.items():
        assert score.log_prob == pytest.approx(expected[pair].log_prob, abs=1e-5)
        assert score[1:] == expected[pair][1:]
    monkeypatch.setattr(continuations, "NEAR", 0.0)
    wrong = score_continuations(golden.model, prompts, pairs)
    assert any(wrong[pair].greedy != expected[pair].greedy for pair in pairs)


def test_what_is_likelier_by_next_to_nothing_is_computed_as_the_plain_form_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden, prompts = load_golden("gpt2"), Prompts(load_golden("gpt2").tokenizer)
    pairs = [(PROMPT, "in"), (PROMPT, "is")]
    ((*_, (one,)), (*_, (other,))) = prompts.continuations(pairs)
    tokens = [one, other]
    expected = {pair: by_hand(golden, *pair) for pair in pairs}
    worse, better = sorted(range(2), key=lambda i: expected[pairs[i]].log_prob)
    assert not expected[pairs[better]].greedy
    original = continuations.logits_at

    def off(*arguments: Any) -> torch.Tensor:
        logits = original(*arguments)
        logits[:, tokens[worse]] = logits[:, tokens[better]] + continuations.NEAR / 4
        return logits

    monkeypatch.setattr(continuations, "logits_at", off)
    scored = score_continuations(golden.model, prompts, pairs)
    assert scored[pairs[worse]].log_prob < scored[pairs[better]].log_prob


def test_too_long_a_prompt_scores_nothing(golden: Golden) -> None:
    pair = ("and so on " * 100, "more")
    scored = score_continuations(golden.model, Prompts(golden.tokenizer), [pair, PAIRS[0]])
    assert math.isnan(scored[pair].log_prob)
    assert scored[pair][1:] == (False, 0.0)
    assert math.isfinite(scored[PAIRS[0]].log_prob)


def test_a_ruined_model_is_never_right(golden: Golden) -> None:
    weight = golden.model.get_output_embeddings().weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        scored = score_continuations(golden.model, Prompts(golden.tokenizer), PAIRS)
    finally:
        weight.data.copy_(before)
    assert all(math.isnan(s.log_prob) and not s.greedy for s in scored.values())
