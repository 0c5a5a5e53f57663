"""The optimisation problem of a target, in tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmet.errors import RequestError
from pmet.model import (
    TokenizedPrompt,
    tokenize_continuation,
    tokenize_kl_prompt,
    tokenize_prompt,
    tokenize_target,
)
from pmet.request import EditRequest


@dataclass(frozen=True)
class Problem:
    """One request, or several that share their key and therefore their target.

    Attributes:
        contexts: each request's prompt in every context, followed by the new answer's tokens
            except the last.
        kl: the KL prompt, which requests with the same subject share.
        answers: the new answer's tokens, by context.
        requests: the number of requests.
    """

    contexts: tuple[TokenizedPrompt, ...]
    kl: TokenizedPrompt
    answers: tuple[tuple[int, ...], ...]
    requests: int = 1

    @classmethod
    def of(cls, tokenizer: Any, request: EditRequest, templates: Sequence[str]) -> Problem:
        """Tokenize a request.

        Raises:
            RequestError: subject or target have no tokens.
        """
        new, between = request.target_new, request.separator
        bare = tokenize_target(tokenizer, request, new)
        answers = tuple(
            bare
            if template.endswith("{}")
            # Text after the prompt, as in a chat template, decides how the target begins.
            else tokenize_continuation(
                tokenizer, template.replace("{}", request.text), new, between
            )
            for template in templates
        )
        prompts = [tokenize_prompt(tokenizer, request, template) for template in templates]
        kl = tokenize_kl_prompt(tokenizer, request)
        return cls(
            contexts=tuple(
                replace(p, ids=p.ids + answer[:-1])
                for p, answer in zip(prompts, answers, strict=True)
            ),
            # The KL term reads the subject's last token, which no later token affects.
            kl=replace(kl, ids=kl.ids[: kl.subject_last + 1]),
            answers=answers,
        )

    @classmethod
    def joined(cls, problems: Sequence[Problem]) -> Problem:
        """A single target for several ``problems`` with the same ``key_tokens``."""
        return cls(
            contexts=tuple(prompt for problem in problems for prompt in problem.contexts),
            kl=problems[0].kl,
            answers=tuple(answer for problem in problems for answer in problem.answers),
            requests=sum(problem.requests for problem in problems),
        )

    @property
    def key_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The bare prompt up to the subject's last token, and the KL prompt.

        Requests that agree in both have the same subject with the same text before it, so no FFN
        can distinguish them at the subject's last token: their keys are equal.
        """
        bare = self.contexts[0]
        return bare.ids[: bare.subject_last + 1], self.kl.ids

    @property
    def kl_shared(self) -> bool:
        """Whether the bare prompt begins with the KL prompt up to the subject's last token."""
        up_to_subject, kl = self.key_tokens
        return up_to_subject == kl

    @property
    def kl_row(self) -> int:
        """The index of the prompt that the KL term reads, at the subject's last token."""
        return 0 if self.kl_shared else len(self.contexts)

    @property
    def prompts(self) -> tuple[TokenizedPrompt, ...]:
        """All prompts to run: the contexts, then the KL prompt unless one of them replaces it."""
        return self.contexts if self.kl_shared else (*self.contexts, self.kl)

    @property
    def rows(self) -> list[tuple[TokenizedPrompt, int]]:
        """Each prompt with the number of its context; the KL prompt's number comes last."""
        templates = len(self.contexts) // self.requests
        numbers = [*list(range(templates)) * self.requests, templates]
        return list(zip(self.prompts, numbers, strict=False))

    @property
    def read_tokens(self) -> int:
        """The number of places where the loss reads the answers."""
        return sum(map(len, self.answers))

    @property
    def shape(self) -> tuple[int, int]:
        """Longest suffix and longest prefix, in tokens."""
        return (
            max(len(p.suffix) for p in self.prompts),
            max(len(p.prefix) for p in self.prompts),
        )

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return max(len(p.ids) for p in self.prompts)

    def check_length(self, request: EditRequest, limit: int | None) -> None:
        """Refuse a request that a model with ``limit`` positions cannot read whole.

        Raises:
            RequestError: naming the lengths.
        """
        longest = self.longest
        if limit is not None and longest > limit:
            raise RequestError(
                f"the prompt about {request.subject[:60]!r} takes {longest} tokens with its "
                f"context and target, but the model reads {limit}; shorten it"
            )


def sharing_a_key(problems: Sequence[Problem]) -> list[list[int]]:
    """Groups of indices of problems with the same ``key_tokens``, in order of their first."""
    groups: dict[object, list[int]] = {}
    for place, problem in enumerate(problems):
        groups.setdefault(problem.key_tokens, []).append(place)
    return list(groups.values())
