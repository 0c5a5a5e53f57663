"""A model's answers to edit requests, scored with the field's metrics.

docs/metrics.md has each figure with its definition and source. In short, on the prompts of a
request:

- efficacy: on the request's own prompt, the new target against the true one
- generalization: the same on paraphrase prompts
- specificity: on neighborhood prompts, the true target against the new one
- portability: on prompts about consequences of the fact, their own answers

each in the probability form (the wanted target is more likely than the other one, by mean
log-probability over its tokens), the strict form (``_strict``: it is the greedy answer at every
one of its tokens) and by tokens (``_accuracy``: the share of tokens where it is). ``score`` is the
harmonic mean of the first three. In the model's own words, the shares of answers that state the
new target (`pmet.evaluation.said`). On request, fluency and consistency of generated text.

A request's figure is the mean over its prompts; a model's is the mean over the prompts of all
requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pmet.evaluation.continuations import BATCH_TOKENS, logits_at, score_continuations
from pmet.evaluation.figures import summarize
from pmet.evaluation.generation import write_on
from pmet.evaluation.prompts import Prompts
from pmet.evaluation.questions import beginnings, continuation, continuations_of, figures_of
from pmet.evaluation.said import add_locality, add_said, ask_questions, drafts_of, questions_of
from pmet.evaluation.texts import add_consistency
from pmet.evaluation.texts import fluency as fluency_of
from pmet.model import batches_by_tokens, context_length, encode_all, frozen, pad
from pmet.request import EditRequest

TEXT_TOKENS = 512
"""Number of tokens that a held-out text is truncated to."""


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    answers: Collection[int] | Literal["all"] = (),
    base: Sequence[Mapping[str, Any]] | None = None,
    fluency: bool = False,
    chat_template: bool = False,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model's answers to edit requests.

    Args:
        model: a causal language model; left unchanged.
        tokenizer: its fast tokenizer.
        requests: requests with the data to measure them by: probability figures need
            ``target_true``, the others need paraphrase, neighborhood or portability prompts.
        answers: numbers of the requests that the model answers in its own words, which takes
            several times as long as the other figures; ``"all"``: all of them.
        base: for each request, its row of the base model's evaluation, to measure locality.
        fluency: generate text with the model, and measure fluency and consistency.
        chat_template: ask every prompt as a user turn of the tokenizer's chat template.
        seed: seed for generating text.
        batch_tokens: padded tokens of one forward pass; affects only speed.
        on_progress: called with the number of continuations just scored.

    Returns:
        The figures of ``OF_REQUESTS`` and ``score``: fractions in [0, 1] (fluency in bits), or None
        if no request has the data for them; and ``rows``: the same figures for each request, with
        the number of prompts that they are means over (``efficacy_prompts``, …), the model's
        ``answer``, ``chat_answer`` and answers to ``neighbors``, and the ``text`` that it
        generated.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    prompts = Prompts(tokenizer, chat_template)
    scored = score_continuations(
        model,
        prompts,
        [pair for request in requests for pair in continuations_of(request)],
        batch_tokens=batch_tokens,
        on_progress=on_progress,
    )
    rows = [figures_of(request, scored) for request in requests]
    answered = range(len(rows)) if answers == "all" else sorted(map(int, answers))
    own = [requests[i] for i in answered]
    said = ask_questions(model, prompts, questions_of(own), drafts_of(requests, base or ()))
    add_said([rows[i] for i in answered], own, said)
    if base is not None:
        for row, unedited in zip(rows, base, strict=True):
            add_locality(row, unedited)
    if fluency:
        starts = dict.fromkeys(text for request in requests for text in beginnings(request))
        written = write_on(model, prompts, list(starts), seed=seed)
        add_texts(rows, requests, dict(zip(starts, written, strict=True)))
        add_consistency(zip(rows, (r.reference_texts for r in requests), strict=True))
    return {**summarize(rows), "rows": rows}


def add_texts(
    rows: Sequence[dict[str, Any]], requests: Sequence[EditRequest], written: Mapping[str, str]
) -> None:
    """Add the generated text and its fluency to each request's figures.

    Args:
        rows: the figures of each request.
        requests: the requests.
        written: the text generated from each beginning.
    """
    for row, request in zip(rows, requests, strict=True):
        own = [written[text] for text in beginnings(request)]
        row |= {"fluency": fluency_of(own), "text": "\n".join(own)}


def knows(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[bool]:
    """Whether the greedy answer to each request's own prompt already is its new target.

    This is just ``efficacy_strict``, at one short pass per request.
    """
    asked = [continuation(request, request.text, request.target_new) for request in requests]
    scored = score_continuations(model, Prompts(tokenizer), asked, batch_tokens=batch_tokens)
    return [scored[pair].greedy for pair in asked]


@dataclass(frozen=True)
class TextScore:
    """A model's score of one text.

    Attributes:
        nll: sum of −log p over its tokens except the first, in nats.
        greedy: the most likely token at each of these positions.
    """

    nll: float
    greedy: list[int]

    def agreed(self, other: TextScore) -> int:
        """Number of positions at which two models have the same most likely token."""
        return sum(a == b for a, b in zip(self.greedy, other.greedy, strict=True))


@torch.no_grad()
def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int = TEXT_TOKENS,
    on_progress: Callable[[Sequence[str]], None] | None = None,
) -> list[TextScore]:
    """Score ordinary text: for perplexity, and for agreement with another model.

    Perplexity is exp(Σ ``nll`` / number of tokens), over all texts, without each first token.

    Args:
        model: a causal language model; left unchanged.
        tokenizer: its fast tokenizer.
        texts: the texts.
        max_tokens: number of tokens that a text is truncated to.
        on_progress: called with the texts just scored.
    """
    limit = min(max_tokens, context_length(model.config) or max_tokens)
    sequences = [ids[:limit] for ids in encode_all(tokenizer, texts)]
    scores = [TextScore(0.0, [])] * len(texts)
    order = sorted(
        (i for i, s in enumerate(sequences) if len(s) > 1), key=lambda i: len(sequences[i])
    )
    device = next(model.parameters()).device
    if on_progress:
        # Nothing is predicted in texts of a single token.
        on_progress([text for text, s in zip(texts, sequences, strict=True) if len(s) <= 1])
    with frozen(model):
        for batch in batches_by_tokens(order, BATCH_TOKENS, lambda i: len(sequences[i])):
            ids_BT, mask_BT = pad([sequences[i][:-1] for i in batch], device)
            rows_N, columns_N = mask_BT.nonzero(as_tuple=True)
            logits_NV = logits_at(
                model, {"input_ids": ids_BT, "attention_mask": mask_BT}, rows_N, columns_N
            )
            labels_N = torch.tensor([t for i in batch for t in sequences[i][1:]], device=device)
            said_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
            nll_N = (logits_NV.logsumexp(-1) - said_N).double()
            lengths = [len(sequences[i]) - 1 for i in batch]
            parts = zip(nll_N.split(lengths), logits_NV.argmax(-1).split(lengths), strict=True)
            for i, (nll_T, best_T) in zip(batch, parts, strict=True):
                scores[i] = TextScore(nll_T.sum().item(), best_T.tolist())
            if on_progress:
                on_progress([texts[i] for i in batch])
    return scores
