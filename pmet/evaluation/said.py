"""What a model says when it is asked: its answers in its own words, and the figures they give.

Every answer is greedy and ends by itself, at the end of a sentence or after ``SAID_TOKENS`` tokens;
`pmet.evaluation.statements` decides what it states. On a request's own prompt, its paraphrases and
its questions in chat, an answer should state the new target. On prompts that the edit should leave
alone, it should be the base model's: there only the first clause counts, since what follows it is
a matter of style. The base's clauses serve as drafts: one pass of the edited model finds which of
them it would say too, and only the others are generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from torch import nn

from pmet.evaluation.continuations import score_tokens
from pmet.evaluation.generation import Said, say
from pmet.evaluation.prompts import Prompts, Tokens
from pmet.evaluation.statements import clause_end, first_stated, sentence_end
from pmet.request import EditRequest

SAID_TOKENS = 32
"""Tokens of an answer, at most."""

Answers = Mapping[str, Said | None]
"""Answers by prompt; None for a prompt that leaves no room for one in the model's context."""


@dataclass(frozen=True)
class Questions:
    """Prompts for a model to answer.

    Attributes:
        stated: prompts whose answers should state a target.
        chat: the same, as user turns of the chat template.
        kept: prompts whose answers should not change.
    """

    stated: Sequence[str] = ()
    chat: Sequence[str] = ()
    kept: Sequence[str] = ()


@dataclass
class Answered:
    """The answers to ``Questions``, by prompt."""

    stated: dict[str, Said | None] = field(default_factory=dict)
    chat: dict[str, Said | None] = field(default_factory=dict)
    kept: dict[str, Said | None] = field(default_factory=dict)

    def add(self, other: Answered) -> None:
        """Add the answers to other questions."""
        self.stated |= other.stated
        self.chat |= other.chat
        self.kept |= other.kept


def questions_of(requests: Iterable[EditRequest]) -> Questions:
    """The questions of requests, each once."""
    stated: dict[str, None] = {}
    chat: dict[str, None] = {}
    kept: dict[str, None] = {}
    for request in requests:
        stated |= dict.fromkeys((request.text, *request.paraphrase_prompts))
        chat |= dict.fromkeys(chat_questions(request))
        kept |= dict.fromkeys(request.neighborhood_prompts)
    return Questions(list(stated), list(chat), list(kept))


@cache
def unrelated_prompts() -> tuple[str, ...]:
    """Prompts about general knowledge, whose answers no edit should change."""
    text = resources.files("pmet.evaluation").joinpath("unrelated.txt").read_text("utf-8")
    return tuple(text.splitlines())


def chat_questions(request: EditRequest) -> Sequence[str]:
    """The questions to put to a chat model; by default its prompt, as a sentence to complete."""
    return request.question_prompts or (f"Complete the sentence: {request.text}",)


def ask_questions(
    model: nn.Module, prompts: Prompts, questions: Questions, drafts: Answers | None = None
) -> Answered:
    """A model's answers.

    Args:
        model: a causal language model; left unchanged.
        prompts: how prompts are presented to the model. Without a chat template, the questions
            for chat are left out.
        questions: the questions.
        drafts: answers of another model, which this one is expected to give as well.
    """
    tokenizer = prompts.tokenizer
    answered = Answered(kept=_confirmed(model, prompts, questions.kept, drafts or {}))
    others = [text for text in questions.kept if text not in answered.kept]
    asked = [
        (answered.stated, prompts, questions.stated, sentence_end),
        (answered.kept, prompts, others, clause_end),
    ]
    if prompts.has_chat:
        chat = Prompts(tokenizer, chat=True)
        asked.append((answered.chat, chat, questions.chat, sentence_end))
    # In batches together: a step of generation takes nearly as long with few rows as with many.
    beginnings = [ids for _, how, texts, _ in asked for ids in how.tokens(texts)]
    ends = [end for *_, texts, end in asked for _ in texts]
    said = iter(say(model, tokenizer, beginnings, tokens=SAID_TOKENS, ends=ends))
    for own, _, texts, _ in asked:
        own |= zip(texts, said)  # noqa: B905 - the answers to others follow
    return answered


def _confirmed(
    model: nn.Module, prompts: Prompts, texts: Sequence[str], drafts: Answers
) -> dict[str, Said | None]:
    """The drafts that are the model's own greedy answers."""
    own = {text: draft for text in texts if (draft := drafts.get(text)) is not None}
    tokens: dict[str, tuple[Tokens, Tokens]] = {
        text: (ids, tuple(own[text].ids))
        for text, ids in zip(own, prompts.tokens(list(own)), strict=True)
    }
    scored = score_tokens(model, tokens)
    return {text: draft for text, draft in own.items() if scored[text].greedy}


def add_said(
    rows: Sequence[dict[str, Any]], requests: Sequence[EditRequest], answered: Answered
) -> None:
    """Add the figures of ``SAID`` to each request's, with the answers that they come from.

    Added are ``answer``, ``chat_answer`` (to the first question) and ``neighbors``: for each
    neighborhood prompt what was said, as a `Said` or None.
    """
    for row, request in zip(rows, requests, strict=True):
        targets = [t for t in (request.target_new, request.target_true) if t is not None]
        own = answered.stated[request.text]
        stated = _states(own, targets)
        row["efficacy_said"] = float(stated == request.target_new)
        if request.target_true is not None:
            row["old_said"] = float(stated == request.target_true)
        row["run_on"] = float(stated == request.target_new and own is not None and not own.ended)
        row["generalization_said"] = _share(
            answered.stated, request.paraphrase_prompts, request.target_new, targets
        )
        row["answer"] = said_text(own)
        if answered.chat:
            asked = chat_questions(request)
            row["chat_said"] = _share(answered.chat, asked, request.target_new, targets)
            row["chat_prompts"] = len(asked)
            row["chat_answer"] = said_text(answered.chat[asked[0]])
        row["neighbors"] = [answered.kept[prompt] for prompt in request.neighborhood_prompts]


def add_locality(row: dict[str, Any], base: Mapping[str, Any]) -> None:
    """Add ``locality`` to a request's figures: whether its neighbors' answers are the base's.

    Args:
        row: figures and answers on the edited model.
        base: the same on the base model.
    """
    own, before = (neighbors_said(r) for r in (row, base))
    if own and before:
        row["locality"] = sum(map(same, own, before)) / len(own)


def drafts_of(
    requests: Iterable[EditRequest], rows: Iterable[Mapping[str, Any]]
) -> dict[str, Said]:
    """The answers in rows of requests that another model may give as well, by prompt."""
    drafts: dict[str, Said] = {}
    for request, row in zip(requests, rows, strict=False):
        answers = row.get("neighbors") or ()
        for prompt, said in zip(request.neighborhood_prompts, answers, strict=False):
            if said is not None:
                # Read from a file, it is a list.
                drafts[prompt] = Said(*said)
    return drafts


def neighbors_said(row: Mapping[str, Any]) -> list[str]:
    """The answers to a request's neighborhood prompts; empty if they were not asked."""
    return [said_text(said and Said(*said)) for said in row.get("neighbors") or ()]


def same(answer: str, base: str) -> bool:
    """Whether two answers of one clause are the same, but for case."""
    return answer.casefold() == base.casefold()


def _states(said: Said | None, targets: Sequence[str]) -> str | None:
    return None if said is None else first_stated(said.text, targets)


def _share(
    answers: Answers, prompts: Sequence[str], wanted: str, targets: Sequence[str]
) -> float | None:
    if not prompts:
        return None
    stated = [_states(answers[prompt], targets) == wanted for prompt in prompts]
    return math.fsum(stated) / len(stated)


def said_text(said: Said | None) -> str:
    """An answer as text; empty if there was no room for one."""
    return "" if said is None else said.text.strip()
