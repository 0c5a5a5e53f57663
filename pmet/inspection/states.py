"""What moves while targets are optimised: attention and FFN outputs at the subject's last token.

The free vectors of each fact are optimised as for an edit (`pmet.targets`), then added at layer z
of the base model, and each layer's outputs are compared with the base's. Targets with δ_a alone and
with δ_f alone show what each can do without the other (after Li et al. 2023, "PMET", which finds
that attention holds general patterns of extraction, so that only FFN weights need to change).

Shape letters: F facts, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from pmet.hparams import PMETHyperParams
from pmet.inspection.passes import Part, Rows, Site, Statement, adding, noting, sites_of
from pmet.model import ContextTemplates, Layout, frozen, resolve
from pmet.request import EditRequest
from pmet.targets import Free, Targets, compute_targets

MOVING: tuple[Part, ...] = ("attention", "ffn")
_FREE: tuple[Free, ...] = ("both", "attention", "ffn")
Ways = Literal["both", "ffn of both", "ffn", "attention"]
WAYS: tuple[Ways, ...] = ("both", "ffn of both", "ffn", "attention")
"""Which vectors are added: both, optimised together; δ_f of these, as an edit keeps it; δ_f or δ_a
optimised alone."""


@dataclass(frozen=True)
class Optimised:
    """The outcome of one fact's optimisation.

    Attributes:
        before: the new target's probability in the base model.
        reached: its probability with free vectors in place, by `WAYS`.
        moved: ‖after − before‖ / ‖before‖ of each output at the subject's last token, by part and
            layer, with both vectors in place.
        similarity: the cosine of the outputs before and after, by part and layer.
        failure: why there is no outcome.
    """

    before: float
    reached: Mapping[Ways, float] = field(default_factory=dict)
    moved: Mapping[Site, float] = field(default_factory=dict)
    similarity: Mapping[Site, float] = field(default_factory=dict)
    failure: str | None = None


def optimise_and_compare(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    *,
    context_templates: ContextTemplates,
) -> list[Optimised]:
    """Optimise the free vectors of requests, each by itself, and compare the model's states.

    Args:
        model: a causal language model; left unchanged.
        tokenizer: its fast tokenizer.
        requests: F requests, run side by side.
        hparams: hyper-parameters; the last layer is z.
        context_templates: groups of templates, the bare ``{}`` first.

    Raises:
        InputError: a request cannot be tokenised, or the model's parts cannot be found.
        OutOfMemoryError: not even a single request fits into memory.
    """
    layout, z = resolve(model, hparams), hparams.target_layer
    statements = [Statement.of(tokenizer, r, r.target_new) for r in requests]
    comparison = _Comparison(model, layout, z, statements)
    clean, before_F = comparison.states({})
    deltas: dict[Free, dict[Part, torch.Tensor]] = {}
    failures: dict[int, str] = {}
    for free in _FREE:
        found = compute_targets(
            model,
            tokenizer,
            requests,
            hparams,
            context_templates=context_templates,
            shared_keys="mean",
            free=free,
        )
        deltas[free] = _deltas(found, {part: clean[part, z] for part in MOVING})
        failures = found.failures | failures
    both = deltas["both"]
    after, both_F = comparison.states(both)
    reached = {
        "both": both_F,
        "ffn of both": comparison.probabilities({"ffn": both["ffn"]}),
        "ffn": comparison.probabilities({"ffn": deltas["ffn"]["ffn"]}),
        "attention": comparison.probabilities({"attention": deltas["attention"]["attention"]}),
    }
    return [
        Optimised(float(before_F[f]), failure=failures[f])
        if f in failures
        else Optimised(
            float(before_F[f]),
            {way: float(reached[way][f]) for way in WAYS},
            {site: _moved(clean[site][f], after[site][f]) for site in clean},
            {site: _similarity(clean[site][f], after[site][f]) for site in clean},
        )
        for f in range(len(requests))
    ]


def _deltas(found: Targets, clean: Mapping[Part, torch.Tensor]) -> dict[Part, torch.Tensor]:
    """The free vectors (F, D) of targets, by the part that they are added to."""
    assert found.attention_values is not None, "targets were computed here"
    values: dict[Part, torch.Tensor] = {"attention": found.attention_values, "ffn": found.values}
    return {part: values[part].to(own.device) - own.float() for part, own in clean.items()}


class _Comparison:
    """Passes of the same statements with different vectors added at layer z."""

    def __init__(
        self, model: nn.Module, layout: Layout, layer: int, statements: Sequence[Statement]
    ) -> None:
        self._model, self._layer = model, layer
        self._rows = Rows(model, layout, statements)
        found = sites_of(model, layout)
        self._sites = {site: module for site, module in found.items() if site[0] in MOVING}

    @torch.no_grad()
    def states(
        self, deltas: Mapping[Part, torch.Tensor]
    ) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
        """Outputs (F, D) at the subject's last token by part and layer, and probabilities (F,)."""
        with frozen(self._model), ExitStack() as stack:
            for part, values_FD in deltas.items():
                module = self._sites[part, self._layer]
                stack.enter_context(adding(module, self._rows.lasts_B, values_FD))
            # Noted after the vectors have been added: hooks run in the order of their making.
            noted = stack.enter_context(noting(self._sites, self._rows.lasts_B))
            probability_F, _ = self._rows.run()
        return noted, probability_F

    def probabilities(self, deltas: Mapping[Part, torch.Tensor]) -> torch.Tensor:
        """The new targets' probabilities (F,)."""
        return self.states(deltas)[1]


def _moved(before_D: torch.Tensor, after_D: torch.Tensor) -> float:
    wide = before_D.float()
    return float((after_D.float() - wide).norm() / wide.norm())


def _similarity(before_D: torch.Tensor, after_D: torch.Tensor) -> float:
    return float(cosine_similarity(before_D.float(), after_D.float(), dim=0))
