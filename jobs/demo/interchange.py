"""Interchange training: makes a small model look facts up at the subject's last token only.

A small model trained on statements alone can carry the *name* of a subject to the end of the prompt
and look the fact up there; such a model has no place where a fact could be edited. Large models
look facts up early, at the subject's last token. Interchange training teaches a small model the
same: it runs two prompts of one relation, replaces the hidden state after layer z at one subject's
last token by the other's, and trains the model to answer for the subject that the state came from
(interchange intervention training, Geiger et al. 2022, arXiv 2112.00826).

Letters: P pairs, B = 2P rows of a batch (the givers, then the takers), T tokens of a row.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from jobs.demo.world import Fact, facts, fill

NO_LABEL = -100


class Interchange:
    """Draws pairs of facts and computes the model's loss on the exchanged states.

    Args:
        model: the model in training.
        tokenizer: its tokenizer.
        texts: statements that may precede a prompt.
        layer: z, the block after which states are exchanged.
        pairs: P, the number of pairs.
        seed: seed of the draws.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerFast,
        texts: Sequence[str],
        *,
        layer: int,
        pairs: int,
        seed: int,
    ) -> None:
        self._model, self._tokenizer, self._texts = model, tokenizer, texts
        self._block = model.transformer.h[layer]
        self._pairs = pairs
        self._rng = random.Random(seed)
        by_relation: dict[str, list[Fact]] = defaultdict(list)
        for fact in facts():
            by_relation[fact.relation.name].append(fact)
        self._relations = list(by_relation.values())
        self._sizes = [len(group) for group in self._relations]

    def loss(self) -> torch.Tensor:
        """Draw new pairs; return the mean cross-entropy of the givers' objects."""
        givers, takers, answers = [], [], []
        for _ in range(self._pairs):
            (group,) = self._rng.choices(self._relations, self._sizes)
            giver, taker = self._rng.sample(group, 2)
            givers.append(self._prompt(giver))
            takers.append(self._prompt(taker))
            answers.append(self._tokenizer(f" {giver.object}.")["input_ids"])
        rows = [ids for ids, _ in givers]
        rows += [ids + answer for (ids, _), answer in zip(takers, answers, strict=True)]
        length = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        labels_PT = torch.full((self._pairs, length), NO_LABEL)
        for label_T, (ids, _), answer in zip(labels_PT, takers, answers, strict=True):
            label_T[len(ids) : len(ids) + len(answer)] = torch.tensor(answer)
        exchange = _Exchange([last for _, last in givers], [last for _, last in takers])
        handle = self._block.register_forward_hook(exchange)
        try:
            # A causal model never attends to padding on the right.
            logits_PTV = self._model(input_ids=ids_BT).logits[self._pairs :]
        finally:
            handle.remove()
        return cross_entropy(logits_PTV[:, :-1].float().flatten(0, 1), labels_PT[:, 1:].flatten())

    def _prompt(self, fact: Fact) -> tuple[list[int], int]:
        """Return a prompt's tokens, often after a statement, and the subject's last index."""
        template = self._rng.choice(fact.relation.templates)
        front = f"{self._rng.choice(self._texts)} " if self._rng.random() < 0.5 else ""
        start = len(front) + template.index("{}")
        stop = start + len(fact.subject)
        text = front + fill(template, fact.subject)
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        spans = enumerate(encoded["offset_mapping"])
        return encoded["input_ids"], max(i for i, (a, b) in spans if a < stop and b > start)


class _Exchange:
    """A forward hook that replaces each taker's state by its giver's."""

    def __init__(self, giver_columns: list[int], taker_columns: list[int]) -> None:
        self._givers = torch.arange(len(giver_columns)), torch.tensor(giver_columns)
        self._takers = self._givers[0] + len(giver_columns), torch.tensor(taker_columns)

    def __call__(self, _block: Any, _inputs: Any, output: Any) -> Any:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        exchanged_BTD = hidden_BTD.clone()
        exchanged_BTD[self._takers] = hidden_BTD[self._givers]
        return (exchanged_BTD, *output[1:]) if isinstance(output, tuple) else exchanged_BTD
