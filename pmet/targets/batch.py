"""The state of a batch during the optimisation of targets: its requests and where the loss reads.

Shape letters: E requests, B rows (the prompts of a request), D model width, M places where the loss
reads, N target tokens to predict there, V vocabulary, P = 2 free vectors per request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from pmet.targets.problem import Problem


@dataclass(frozen=True)
class Places:
    """The places where the loss of a batch reads.

    Attributes:
        owners_B: the request that each row belongs to.
        rows_M: row of each place; the last E places are the KL term's, by request.
        columns_M: column of each place.
        read_N: the place that predicts each target token of each context.
        labels_N: each target token.
        owners_N: the request of each target token.
        shares_N: the weight of each target token in the mean over tokens and contexts.
    """

    owners_B: torch.Tensor
    rows_M: torch.Tensor
    columns_M: torch.Tensor
    read_N: torch.Tensor
    labels_N: torch.Tensor
    owners_N: torch.Tensor
    shares_N: torch.Tensor

    @classmethod
    def of(cls, problems: Sequence[Problem], device: torch.device) -> Places:
        """The places that the loss of ``problems`` reads; their prompts are the batch's rows."""
        owners: list[int] = []
        at_kl: list[tuple[int, int]] = []
        wanted: list[tuple[int, int]] = []
        labels: list[int] = []
        shares: list[float] = []
        owners_of_labels: list[int] = []
        for owner, problem in enumerate(problems):
            row = len(owners)
            for c, (prompt, answer) in enumerate(
                zip(problem.contexts, problem.answers, strict=True)
            ):
                length = len(answer)
                start = len(prompt.suffix) - length
                wanted += [(row + c, start + i) for i in range(length)]
                labels += answer
                shares += [1 / (length * len(problem.contexts))] * length
            owners_of_labels += [owner] * problem.read_tokens
            at_kl.append((row + problem.kl_row, 0))
            owners += [owner] * len(problem.prompts)
        # Only a KL place can coincide with another place.
        apart = set(at_kl)
        places = [place for place in wanted if place not in apart] + at_kl
        number = {place: i for i, place in enumerate(places)}
        return cls(
            torch.tensor(owners, device=device),
            torch.tensor([row for row, _ in places], device=device),
            torch.tensor([column for _, column in places], device=device),
            torch.tensor([number[place] for place in wanted], device=device),
            torch.tensor(labels, device=device),
            torch.tensor(owners_of_labels, device=device),
            torch.tensor(shares, device=device),
        )


@dataclass
class State:
    """The state of the optimisation of E requests; every tensor is indexed by request.

    Attributes:
        clean_EPD: the vectors that the free ones are added to, attention first.
        deltas_EPD: the free vectors.
        mean_EPD: Adam's first moment.
        square_EPD: Adam's second moment.
        nll_factor_E: φ of the next evaluation.
        before_EV: original log p on the KL prompt; known from the first evaluation on.
    """

    clean_EPD: torch.Tensor
    deltas_EPD: torch.Tensor
    mean_EPD: torch.Tensor
    square_EPD: torch.Tensor
    nll_factor_E: torch.Tensor
    before_EV: torch.Tensor

    @classmethod
    def start(cls, clean_EPD: torch.Tensor, nll_factor: float, vocabulary: int) -> State:
        """The state before the first evaluation.

        Args:
            clean_EPD: the vectors that the free ones will be added to.
            nll_factor: φ.
            vocabulary: V.
        """
        zeros = torch.zeros_like(clean_EPD)
        count = len(clean_EPD)
        return cls(
            clean_EPD,
            zeros,
            zeros.clone(),
            zeros.clone(),
            zeros.new_full((count,), nll_factor),
            zeros.new_zeros(count, vocabulary),
        )

    def kept(self, keep: torch.Tensor) -> State:
        """The state of some requests, by their indices."""
        return State(*(getattr(self, f.name).index_select(0, keep) for f in fields(self)))

    def joined(self, other: State) -> State:
        """The state of these requests, then of others."""
        return State(
            *(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )


@dataclass
class Member:
    """A request in the batch, or waiting; one that had to leave the batch keeps its state."""

    index: int
    problem: Problem
    evaluations: int = 0
    first_loss: float = math.nan
    state: State | None = None
