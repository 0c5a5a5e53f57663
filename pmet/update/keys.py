"""Lookups of keys: the tokens of each request up to its subject's last one, in batches.

The key of a request at a layer is the down-projection's input at the subject's last token,
averaged over context templates with equal weight per group: half for the bare context, half for
the mean of the generated ones. Tokens after the subject's last one do not affect it, so they are
dropped; and the tokens that a template puts before every prompt are stored once.

Shape letters: E requests, C contexts, B = E·C rows, K key width; with experts, P pairs of a row and
an expert, Q pairs of a request and an expert.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import torch

from pmet.model import ContextTemplates, RoutedKeys, encode, tokenize_prompt
from pmet.request import EditRequest
from pmet.update.spill import Spill

KEY_BATCH = 64
"""Maximum number of requests whose keys are read together."""
KEY_TOKENS = 16384
"""Maximum tokens, including padding, that are read together, except for a single request."""


@dataclass(frozen=True)
class Lookups:
    """Tokens of a batch of requests, up to the subject's last one, in every context.

    Plain arrays of numbers, because there may be as many of these as there are facts.

    Attributes:
        tokens: tokens of all rows, concatenated, without those of the row's context.
        lengths: number of tokens in each row, at least one.
        contexts: each row's context.
        group_sizes: contexts in each group.
    """

    tokens: array[int]
    lengths: array[int]
    contexts: array[int]
    group_sizes: tuple[int, ...]

    @property
    def every(self) -> int:
        """C, the number of rows of a request; its first one is the bare context."""
        return sum(self.group_sizes)

    @property
    def count(self) -> int:
        """E."""
        return len(self.lengths) // self.every

    @property
    def ids(self) -> list[array[int]]:
        """The tokens by row."""
        ends = list(accumulate(self.lengths))
        return [
            self.tokens[end - length : end] for end, length in zip(ends, self.lengths, strict=True)
        ]

    def mean_over_contexts(self, rows_BK: torch.Tensor) -> torch.Tensor:
        """Mean over groups of the means within them: (B, K) to (E, K), in float64."""
        grouped = rows_BK.double().unflatten(0, (-1, self.every)).split(self.group_sizes, dim=1)
        return torch.stack([group.mean(dim=1) for group in grouped]).mean(dim=0)

    def routed_mean_over_contexts(self, routed: RoutedKeys, experts: int) -> RoutedKeys:
        """The same mean of an expert's keys, zero in contexts that are not routed to it.

        Args:
            routed: keys of B rows.
            experts: X, the number of experts.

        Returns:
            Keys of E requests in float64, ordered by request and expert.
        """
        device = routed.keys_PK.device
        sizes_C = torch.tensor([size for size in self.group_sizes for _ in range(size)])
        weights_C = (1.0 / (len(self.group_sizes) * sizes_C.double())).to(device)
        rows_P = routed.rows_P.to(device)
        weighted_PK = weights_C[rows_P % self.every, None] * routed.keys_PK.double()
        pairs_P = rows_P.div(self.every, rounding_mode="floor") * experts + routed.experts_P
        found_Q, places_P = pairs_P.unique(return_inverse=True)
        keys_QK = weighted_PK.new_zeros(len(found_Q), weighted_PK.shape[1])
        keys_QK.index_add_(0, places_P, weighted_PK)
        requests_Q = found_Q.div(experts, rounding_mode="floor")
        return RoutedKeys(requests_Q, found_Q % experts, keys_QK)


class LookupFile(Sequence[Lookups]):
    """Batches of lookups in a temporary file, which disappears with this object or its process."""

    def __init__(self) -> None:
        self._spill = Spill(memory=0)
        self._rows = array("q")
        self._group_sizes: tuple[int, ...] = ()

    @property
    def counts(self) -> list[int]:
        """E of each batch."""
        return [rows // sum(self._group_sizes) for rows in self._rows]

    def append(self, lookups: Lookups) -> None:
        """Append a batch; all batches have the same contexts."""
        arrays = (lookups.tokens, lookups.lengths, lookups.contexts)
        numbers = [torch.frombuffer(each, dtype=torch.int32) for each in arrays]
        self._spill.put(len(self._rows), torch.cat(numbers))
        self._rows.append(len(lookups.lengths))
        self._group_sizes = lookups.group_sizes

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Lookups: ...
    @overload
    def __getitem__(self, place: slice) -> list[Lookups]: ...
    def __getitem__(self, place: int | slice) -> Lookups | list[Lookups]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        rows, stored = self._rows[place], self._spill.get(range(len(self))[place])
        parts = stored.split([len(stored) - 2 * rows, rows, rows])
        tokens, lengths, contexts = (array("i", part.tolist()) for part in parts)
        return Lookups(tokens, lengths, contexts, self._group_sizes)


class LookupTokenizer:
    """Builds lookups from requests.

    Args:
        tokenizer: a fast tokenizer.
        templates: the context templates.

    Attributes:
        shared: for each context the tokens that it puts before every prompt; then, as a further
            context, no tokens, for prompts whose beginning the tokenizer splits differently.
    """

    def __init__(self, tokenizer: Any, templates: ContextTemplates) -> None:
        self._tokenizer = tokenizer
        self._templates = [template for group in templates for template in group]
        self._group_sizes = tuple(len(group) for group in templates)
        heads = [template[: template.index("{}")].rstrip() for template in self._templates]
        self.shared = (*(encode(tokenizer, head) for head in heads), ())

    def batches(self, requests: Sequence[EditRequest]) -> Iterator[Lookups]:
        """Requests in batches, in their order.

        Raises:
            RequestError: no token covers a subject.
        """
        rows: list[tuple[tuple[int, ...], int]] = []
        longest = 0
        for request in requests:
            new = [self._row(request, number) for number in range(len(self._templates))]
            length = max(len(ids) for ids, _ in new)
            full = len(rows) == KEY_BATCH * len(new)
            if rows and (full or (len(rows) + len(new)) * max(longest, length) > KEY_TOKENS):
                yield self._lookups(rows)
                rows, longest = [], 0
            rows, longest = rows + new, max(longest, length)
        if rows:
            yield self._lookups(rows)

    def _row(self, request: EditRequest, number: int) -> tuple[tuple[int, ...], int]:
        prompt = tokenize_prompt(self._tokenizer, request, self._templates[number])
        ids, shared = prompt.ids[: prompt.subject_last + 1], self.shared[number]
        if len(shared) < len(ids) and ids[: len(shared)] == shared:
            return ids[len(shared) :], number
        return ids, len(self._templates)

    def _lookups(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> Lookups:
        return Lookups(
            array("i", [token for ids, _ in rows for token in ids]),
            array("i", [len(ids) for ids, _ in rows]),
            array("i", [context for _, context in rows]),
            self._group_sizes,
        )
