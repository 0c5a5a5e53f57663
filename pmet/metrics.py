"""What a model says about edit requests, in the field's metrics.

Probability form (MEMIT, section "evaluation metrics"): the wanted target is likelier than the
other one, by mean log-probability over its tokens.

- efficacy: on the request's own prompt, the new target against the true one
- generalization: the same on paraphrase prompts
- specificity: on neighborhood prompts, the true target against the new one

Strict form (``_strict``): the wanted target is the greedy answer at every one of its tokens.

A request's figure is the mean over its prompts; a model's is the mean over the prompts of all
requests. ``score`` is the harmonic mean of the three probability figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pmet.lookup import encode, tokenize_continuation
from pmet.padding import batches_by_tokens, pad
from pmet.problem import context_length
from pmet.request import EditRequest
from pmet.tracing import changed_input, frozen

METRICS = (
    "efficacy",
    "generalization",
    "specificity",
    "efficacy_strict",
    "generalization_strict",
    "specificity_strict",
)
BATCH_TOKENS = 2048
"""Padded tokens of one forward pass."""

Continuation = tuple[str, str]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure efficacy, generalization and specificity.

    Args:
        model: a causal language model; left as it was.
        tokenizer: its fast tokenizer.
        requests: requests with what is to be measured on them: probability figures need
            ``target_true``, the others need paraphrase or neighborhood prompts.
        batch_tokens: padded tokens of one forward pass; a choice of speed.
        on_progress: told how many continuations have just been scored.

    Returns:
        The figures of ``METRICS`` and ``score``, fractions in [0, 1] or None where no request has
        what they need, and ``rows``: the same figures for each request, with the number of prompts
        that they are means over (``efficacy_prompts``, …).
    """
    wanted = dict.fromkeys(pair for request in requests for pair in _continuations(request))
    scored = score_continuations(
        model, tokenizer, list(wanted), batch_tokens=batch_tokens, on_progress=on_progress
    )
    rows = [_row(request, scored) for request in requests]
    return {**summarize(rows), "rows": rows}


def summarize(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over all prompts of per-request figures, and their score."""
    figures: dict[str, float | None] = {}
    for metric in METRICS:
        prompts = f"{metric.removesuffix('_strict')}_prompts"
        known = [(v, row[prompts] or 0) for row in rows if (v := row.get(metric)) is not None]
        weight = sum(count for _, count in known)
        figures[metric] = math.fsum(v * count for v, count in known) / weight if weight else None
    figures["score"] = harmonic_mean(
        [figures["efficacy"], figures["generalization"], figures["specificity"]]
    )
    return figures


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """Harmonic mean; None where a value is missing, 0 where one is 0."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return None
    return len(known) / sum(1 / v for v in known) if all(known) else 0.0


@torch.no_grad()
def score_continuations(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Continuation],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[Continuation, tuple[float, bool]]:
    """Mean log-probability of each (prompt, target), and whether it is the greedy answer.

    A pair that is longer than the model's context scores (NaN, False).
    """
    limit = context_length(model.config) or math.inf
    scored: dict[Continuation, tuple[float, bool]] = {}
    items = []
    for pair in pairs:
        prompt_ids = encode(tokenizer, pair[0])
        target_ids = tokenize_continuation(tokenizer, *pair)
        if len(prompt_ids) + len(target_ids) - 1 > limit:
            scored[pair] = (math.nan, False)
        else:
            items.append((prompt_ids + target_ids[:-1], target_ids, pair))
    items.sort(key=lambda item: len(item[0]))
    with frozen(model):
        for batch in batches_by_tokens(items, batch_tokens, _length):
            results = _score_batch(model, [(ids, target) for ids, target, _ in batch])
            scored |= {pair: r for (_, _, pair), r in zip(batch, results, strict=True)}
            if on_progress:
                on_progress(len(batch))
    return scored


def knows(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[bool]:
    """Whether the greedy answer to each request's own prompt is its new target already.

    This is ``efficacy_strict`` alone, for one short pass a request.
    """
    asked = [(request.text, request.target_new) for request in requests]
    pairs = list(dict.fromkeys(asked))
    scored = score_continuations(model, tokenizer, pairs, batch_tokens=batch_tokens)
    return [scored[pair][1] for pair in asked]


def perplexity_sums(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_tokens: int = 512
) -> tuple[float, int]:
    """Sum of −log p over the tokens of ``texts`` but each first one, and their number.

    Perplexity is exp(sum / number); sums add up over shards.
    """
    limit = min(max_tokens, context_length(model.config) or max_tokens)
    sequences = [s for text in texts if len(s := encode(tokenizer, text)[:limit]) > 1]
    sequences.sort(key=len)
    shifted = [(s[:-1], s[1:]) for s in sequences]
    total, count = 0.0, 0
    with frozen(model), torch.no_grad():
        for batch in batches_by_tokens(shifted, BATCH_TOKENS, _length):
            for (_, target), (mean, _) in zip(batch, _score_batch(model, batch), strict=True):
                total -= mean * len(target)
                count += len(target)
    return total, count


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, tokens: int = 8, batch: int = 64
) -> list[str]:
    """What the model says greedily after each text, at most ``tokens`` tokens."""
    device = next(model.parameters()).device
    ids = [encode(tokenizer, text) for text in texts]
    limit = (context_length(model.config) or math.inf) - tokens
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    said = [""] * len(ids)
    with frozen(model):
        for start in range(0, len(order), batch):
            part = [i for i in order[start : start + batch] if len(ids[i]) <= limit]
            if not part:
                continue
            ids_BT, mask_BT = pad([ids[i] for i in part], device, left=True)
            generated = model.generate(  # type: ignore[operator]
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
            for i, row in zip(part, generated, strict=True):
                said[i] = tokenizer.decode(row[ids_BT.shape[1] :], skip_special_tokens=True)
    return said


def _continuations(request: EditRequest) -> list[Continuation]:
    prompts = (request.text, *request.paraphrase_prompts, *request.neighborhood_prompts)
    targets = [t for t in (request.target_new, request.target_true) if t is not None]
    return [(prompt, target) for prompt in prompts for target in targets]


def _row(
    request: EditRequest, scored: Mapping[Continuation, tuple[float, bool]]
) -> dict[str, float | None]:
    new, true = request.target_new, request.target_true
    figures: dict[str, float | None] = {}
    for name, prompts, wanted, other in (
        ("efficacy", (request.text,), new, true),
        ("generalization", request.paraphrase_prompts, new, true),
        ("specificity", request.neighborhood_prompts, true, new),
    ):
        figures[name] = figures[f"{name}_strict"] = None
        figures[f"{name}_prompts"] = len(prompts)
        if not prompts or wanted is None:
            continue
        figures[f"{name}_strict"] = _mean([scored[p, wanted][1] for p in prompts])
        if other is not None:
            figures[name] = _mean([scored[p, wanted][0] > scored[p, other][0] for p in prompts])
    return figures


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def _score_batch(
    model: nn.Module, batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[float, bool]]:
    """Mean log-probability and greediness of each target at the end of its ids."""
    device = next(model.parameters()).device
    ids_BT, mask_BT = pad([ids for ids, _ in batch], device)
    rows: list[int] = []
    columns: list[int] = []
    labels: list[int] = []
    for row, (ids, target) in enumerate(batch):
        rows += [row] * len(target)
        columns += range(len(ids) - len(target), len(ids))
        labels += target
    rows_N, columns_N, labels_N = (torch.tensor(x, device=device) for x in (rows, columns, labels))
    # The head reads only the places of targets: over a large vocabulary it is most of the work.
    with changed_input(_head(model), lambda hidden: hidden[rows_N, columns_N][None]):
        logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
    log_probs = logits.float().log_softmax(-1)
    of_labels = log_probs.gather(1, labels_N[:, None])[:, 0].double()
    greedy = log_probs.argmax(-1) == labels_N
    counts = torch.bincount(rows_N, minlength=len(batch))
    means = torch.zeros(len(batch), dtype=torch.float64, device=device)
    means = means.index_add(0, rows_N, of_labels) / counts
    hits = torch.zeros(len(batch), dtype=torch.int64, device=device)
    hits = hits.index_add(0, rows_N, greedy.long())
    return list(zip(means.tolist(), (hits == counts).tolist(), strict=True))


def _head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    return head


def _length(item: tuple[tuple[int, ...], *tuple[Any, ...]]) -> int:
    return len(item[0])
