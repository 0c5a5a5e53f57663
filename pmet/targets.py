"""Targets: the FFN output at layer z, at the subject's last token, that would say the new fact.

For each request two free vectors are added at layer z, δ_a to the attention projection's output
and δ_f to the down-projection's; Adam moves both, and v* = v_f + δ_f is the target. δ_a is thrown
away: that attention soaks up what is not FFN knowledge is the point of PMET (arXiv 2308.08742,
section "PMET method").

    loss = φ · NLL + κ · KL(after ‖ before) + w · (‖δ_f‖/‖v_f‖² + ‖δ_a‖/‖v_a‖²)

Requests do not interact, so they are optimised side by side and leave the batch when they stop.

Shape letters: E requests, C contexts, D model width, N places where the loss reads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pmet.architecture import Layout, resolve
from pmet.contexts import ContextTemplates, check
from pmet.hparams import PMETHyperParams
from pmet.problem import Problem, context_length
from pmet.request import EditRequest
from pmet.suffix import SuffixRun
from pmet.tracing import frozen

# The published code's constants: when a target is good enough, and how far the likelihood's weight
# falls once the target is the greedy answer everywhere.
LOSS_ENOUGH = 0.05
KL_ENOUGH = 0.01
NLL_RELIEF = 0.1


@dataclass(frozen=True)
class Targets:
    """Targets of E requests, on the CPU.

    Attributes:
        values: (E, D) float32, v*; NaN where there is none.
        steps: (E,) int32, evaluations of the loss before the optimisation stopped.
        losses: (E,) float32, the last loss.
        failures: reason by request index, for those whose optimisation broke down.
    """

    values: torch.Tensor
    steps: torch.Tensor
    losses: torch.Tensor
    failures: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)


def default_batch_size(device: torch.device) -> int:
    """Requests optimised side by side where nobody says: what the caches of a CPU hold, or 64."""
    return 8 if device.type == "cpu" else 64


def compute_targets(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    *,
    context_templates: ContextTemplates,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Targets:
    """Optimise a target for every request.

    Args:
        model: a causal language model; left as it was.
        tokenizer: its fast tokenizer.
        requests: E edit requests.
        hparams: the method's hyper-parameters.
        context_templates: groups of templates, the bare ``{}`` first.
        batch_size: requests optimised side by side; a choice of speed, not of result.
        on_progress: told how many requests have just been finished.

    Raises:
        InputError: a request cannot be tokenised, is longer than the model's context, or the
            model's parts cannot be found.
    """
    layout = resolve(model, hparams)
    templates = [t for group in check(context_templates) for t in group]
    problems = [Problem.of(tokenizer, request, templates) for request in requests]
    limit = context_length(model.config)
    for request, problem in zip(requests, problems, strict=True):
        problem.check_length(request, limit)
    device = layout.weight(model, hparams.target_layer).device
    values = torch.full((len(requests), layout.value_width), torch.nan)
    steps = torch.zeros(len(requests), dtype=torch.int32)
    losses = torch.full((len(requests),), torch.nan)
    failures: dict[int, str] = {}
    # Neighbours of like length share little padding.
    order = sorted(range(len(requests)), key=lambda e: (problems[e].shape, e))
    with frozen(model):
        size = batch_size or default_batch_size(device)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            optimisation = _Optimisation(model, layout, hparams, [problems[e] for e in chunk])
            for e, outcome in zip(chunk, optimisation.run(on_progress), strict=True):
                values[e], steps[e], losses[e] = outcome.value, outcome.steps, outcome.loss
                if outcome.failure:
                    failures[e] = outcome.failure
    return Targets(values, steps, losses, failures)


@dataclass(frozen=True)
class _Outcome:
    value: torch.Tensor
    steps: int
    loss: float
    failure: str | None


@dataclass(frozen=True)
class _Places:
    """Where the loss of a batch reads: N target places, then one KL place per request."""

    rows: torch.Tensor
    columns: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor
    shares: torch.Tensor

    @classmethod
    def of(cls, problems: Sequence[Problem], device: torch.device) -> _Places:
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        shares: list[float] = []
        kl_rows: list[int] = []
        row = 0
        for owner, problem in enumerate(problems):
            length = len(problem.target)
            for prompt in problem.contexts:
                rows += [row] * length
                columns += range(len(prompt.suffix) - length, len(prompt.suffix))
                labels += problem.target
                row += 1
            owners += [owner] * (length * len(problem.contexts))
            shares += [1 / (length * len(problem.contexts))] * (length * len(problem.contexts))
            kl_rows.append(row)
            row += 1
        return cls(
            torch.tensor(rows + kl_rows, device=device),
            torch.tensor(columns + [0] * len(kl_rows), device=device),
            torch.tensor(labels, device=device),
            torch.tensor(owners, device=device),
            torch.tensor(shares, device=device),
        )


class _Optimisation:
    """Adam on the free vectors of a batch of requests."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        hparams: PMETHyperParams,
        problems: Sequence[Problem],
    ) -> None:
        self._hparams = hparams
        self._problems = list(problems)
        self._rows_each = len(problems[0].contexts) + 1
        self._run = SuffixRun(
            model,
            layout,
            hparams.target_layer,
            [prompt for problem in problems for prompt in problem.prompts],
        )
        # The bare context comes first; its clean outputs are the vectors that δ is added to.
        clean = self._run.clean_attention_BD[:: self._rows_each]
        self._device = clean.device
        self._dtype = torch.promote_types(clean.dtype, torch.float32)
        self._clean_EPD = torch.stack(
            [clean, self._run.clean_ffn_BD[:: self._rows_each]], dim=1
        ).to(self._dtype)
        # Both free vectors of a request, attention first: P = 2.
        self._deltas_EPD = torch.zeros_like(self._clean_EPD)
        self._moments = (torch.zeros_like(self._clean_EPD), torch.zeros_like(self._clean_EPD))
        self._nll_factor = torch.full(
            (len(problems),), hparams.nll_loss_factor, device=self._device
        )
        self._active = list(range(len(problems)))
        self._outcomes: list[_Outcome | None] = [None] * len(problems)
        self._places = _Places.of(self._problems, self._device)
        self._before_EV: torch.Tensor | None = None

    def run(self, on_progress: Callable[[int], None] | None) -> list[_Outcome]:
        """Evaluate, stop, step, shrink; until every request has stopped."""
        last = self._hparams.v_num_grad_steps
        for evaluation in range(1, last + 1):
            deltas_EPD = self._deltas_EPD.detach().requires_grad_()
            with torch.enable_grad():
                losses_E, kl_E, greedy_E = self._evaluate(deltas_EPD)
            stopped_E = self._stopped(losses_E.detach(), kl_E, greedy_E)
            if evaluation == last:
                stopped_E = torch.ones_like(stopped_E)
            stopped = stopped_E.tolist()
            if any(stopped):
                self._record(stopped, evaluation, losses_E.detach())
                if on_progress:
                    on_progress(sum(stopped))
            if all(stopped):
                break
            (gradient_EPD,) = torch.autograd.grad(losses_E[~stopped_E].sum(), deltas_EPD)
            self._step(gradient_EPD, evaluation)
            self._shrink()
            if any(stopped):
                self._leave(stopped)
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _evaluate(
        self, deltas_EPD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses, κ·KL and whether the target is the greedy answer everywhere; each (E,)."""
        hparams, places = self._hparams, self._places
        deltas_BPD = deltas_EPD.repeat_interleave(self._rows_each, dim=0)
        logits = self._run.logits(deltas_BPD[:, 0], deltas_BPD[:, 1], places.rows, places.columns)
        log_probs = logits.to(self._dtype).log_softmax(dim=-1)
        on_target_NV, after_EV = log_probs.split([len(places.labels), len(deltas_EPD)])
        if self._before_EV is None:
            self._before_EV = after_EV.detach()
        nll_N = -on_target_NV.gather(1, places.labels[:, None])[:, 0]
        zeros = nll_N.new_zeros(len(deltas_EPD))
        nll_E = zeros.index_add(0, places.owners, nll_N * places.shares)
        wrong_N = (on_target_NV.detach().argmax(1) != places.labels).to(nll_N.dtype)
        greedy_E = zeros.index_add(0, places.owners, wrong_N) == 0
        kl_E = hparams.kl_factor * (after_EV.exp() * (after_EV - self._before_EV)).sum(-1)
        size_EP = deltas_EPD.norm(dim=-1) / self._clean_EPD.norm(dim=-1).square()
        losses_E = self._nll_factor * nll_E + kl_E + hparams.v_weight_decay * size_EP.sum(-1)
        return losses_E, kl_E.detach(), greedy_E

    def _stopped(
        self, losses_E: torch.Tensor, kl_E: torch.Tensor, greedy_E: torch.Tensor
    ) -> torch.Tensor:
        """Who stops at this evaluation; sets φ for the next one."""
        full = self._hparams.nll_loss_factor
        self._nll_factor = torch.where(greedy_E, NLL_RELIEF * full, full).to(self._dtype)
        return (
            (losses_E < LOSS_ENOUGH) | (greedy_E & (kl_E <= KL_ENOUGH)) | ~torch.isfinite(losses_E)
        )

    def _record(self, stopped: list[bool], evaluation: int, losses_E: torch.Tensor) -> None:
        values_ED = (self._clean_EPD[:, 1] + self._deltas_EPD[:, 1]).float().cpu()
        finite = (torch.isfinite(values_ED).all(1) & torch.isfinite(losses_E).cpu()).tolist()
        for e, loss in enumerate(losses_E.tolist()):
            if stopped[e]:
                failure = None if finite[e] else f"the loss is {loss} at evaluation {evaluation}"
                value = values_ED[e] if finite[e] else torch.full_like(values_ED[e], torch.nan)
                self._outcomes[self._active[e]] = _Outcome(value, evaluation, loss, failure)

    def _step(self, gradient_EPD: torch.Tensor, step: int, epsilon: float = 1e-8) -> None:
        """One step of Adam (Kingma & Ba 2015, algorithm 1), β = (0.9, 0.999)."""
        mean, square = self._moments
        mean.lerp_(gradient_EPD, 1 - 0.9)
        square.mul_(0.999).addcmul_(gradient_EPD, gradient_EPD, value=1 - 0.999)
        denominator = (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(epsilon)
        self._deltas_EPD = self._deltas_EPD.addcdiv(
            mean, denominator, value=-self._hparams.v_lr / (1 - 0.9**step)
        )

    def _shrink(self) -> None:
        """Bring each δ back onto the ball of radius clamp · ‖v‖."""
        norm = self._deltas_EPD.norm(dim=-1, keepdim=True)
        radius = self._hparams.clamp_norm_factor * self._clean_EPD.norm(dim=-1, keepdim=True)
        self._deltas_EPD = torch.where(
            norm > radius, self._deltas_EPD * radius / norm, self._deltas_EPD
        )

    def _leave(self, stopped: list[bool]) -> None:
        """Drop the requests that have stopped from all that the next steps compute."""
        staying = [e for e, gone in enumerate(stopped) if not gone]
        keep = torch.tensor(staying, device=self._device)
        rows = keep[:, None] * self._rows_each + torch.arange(self._rows_each, device=self._device)
        self._run.keep(rows.flatten())
        self._problems = [self._problems[e] for e in staying]
        self._active = [self._active[e] for e in staying]
        self._clean_EPD, self._deltas_EPD = self._clean_EPD[keep], self._deltas_EPD[keep]
        self._moments = (self._moments[0][keep], self._moments[1][keep])
        self._nll_factor = self._nll_factor[keep]
        assert self._before_EV is not None
        self._before_EV = self._before_EV[keep]
        self._places = _Places.of(self._problems, self._device)
