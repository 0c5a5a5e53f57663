"""Targets: the FFN output at layer z, at the subject's last token, that expresses the new fact.

For each request two free vectors are added at layer z, δ_a to the attention projection's output
and δ_f to the down-projection's; Adam optimises both, and v* = v_f + δ_f is the target. δ_a is
discarded: letting attention absorb whatever is not FFN knowledge is the point of PMET (arXiv
2308.08742, section "PMET method").

    loss = φ · NLL + κ · KL(after ‖ before) + w · (‖δ_f‖/‖v_f‖² + ‖δ_a‖/‖v_a‖²)

Requests do not interact, so they are optimised side by side; one that stops leaves the batch, and
the next takes its place. Only requests that share a key share their target too, since the model
can have only one output there: they are optimised as one, with the mean of their NLL in the loss
(``pmet.targets.problem``). This is not part of the published method.

Shape letters: E requests (or such groups), B rows (their prompts), D model width, M places where
the loss reads, N target tokens to predict there, V vocabulary, P = 2 free vectors per request.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import nn

from pmet.errors import OutOfMemoryError
from pmet.hparams import PMETHyperParams
from pmet.model import (
    ContextTemplates,
    Layout,
    PrefixFiller,
    check,
    context_length,
    frozen,
    home,
    resolve,
    tuned,
)
from pmet.request import EditRequest, SharedKeys
from pmet.targets.batch import Member, Places, State
from pmet.targets.mechanism import why_whole
from pmet.targets.memory import (
    SCORE_BYTES,
    Count,
    Footprint,
    attention_shape,
    out_of_memory,
    room_beside,
)
from pmet.targets.problem import Problem, sharing_a_key
from pmet.targets.suffix import SuffixRun
from pmet.targets.whole import WholeRun

# The published code's constants: when a target is good enough, and the factor on the likelihood's
# weight once the target is the greedy answer everywhere.
LOSS_ENOUGH = 0.05
KL_ENOUGH = 0.01
NLL_RELIEF = 0.1

Free = Literal["both", "attention", "ffn"]
"""Which of the free vectors are optimised: both, δ_a or δ_f."""

_MOST_ON_CPU, _MOST_ON_GPU = 32, 256
WIDE, _MOST_WIDE_ON_CPU = 512, 16
"""The model width from which on few requests fill a batch, and fewer fit into a CPU's caches."""


@dataclass(frozen=True)
class Targets:
    """Targets of E requests, on the CPU.

    Attributes:
        values: (E, D) float32, v*; NaN if there is none.
        steps: (E,) int32, number of evaluations of the loss before the optimisation stopped.
        losses: (E,) float32, the last loss.
        failures: reason by request index, for requests whose optimisation failed.
        first_losses: (E,) float32, the loss before the first step; None if unknown.
        attention_values: (E, D) float32, v_a + δ_a, which no update uses; None if unknown.
    """

    values: torch.Tensor
    steps: torch.Tensor
    losses: torch.Tensor
    failures: dict[int, str] = field(default_factory=dict)
    first_losses: torch.Tensor | None = None
    attention_values: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)


def default_batch_size(device: torch.device, count: int, width: int) -> int:
    """The default number of ``count`` requests to optimise side by side in a model of ``width``.

    On a CPU, as many as fit in its caches; on a GPU, as many as fill it at the size of GPT-2 and
    above. If not all go in at once, they are split evenly: a small rest would take as many steps.
    """
    most = _MOST_ON_GPU
    if device.type == "cpu":
        most = _MOST_WIDE_ON_CPU if width >= WIDE else _MOST_ON_CPU
    return math.ceil(count / math.ceil(count / most))


def compute_targets(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    *,
    context_templates: ContextTemplates,
    batch_size: int | None = None,
    memory: int | None = None,
    shared_keys: SharedKeys = "joint",
    free: Free = "both",
    on_progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """Optimise a target for every request.

    Args:
        model: a causal language model; left unchanged.
        tokenizer: its fast tokenizer.
        requests: E edit requests.
        hparams: the method's hyper-parameters.
        context_templates: groups of templates, the bare ``{}`` first.
        batch_size: requests optimised side by side, a shared target counting as one; affects only
            speed, not the result. By default :func:`default_batch_size`, or as many as fit in
            ``memory``.
        memory: bytes that may be used beside the model; by default, the free memory.
        shared_keys: ``joint``: requests with the same subject and the same text before it get one
            target that expresses all of their facts; ``mean``: each gets its own, as published.
        free: the vectors that are optimised: ``both``, as published, or one of them, while the
            other stays zero.
        on_progress: called with the number of requests just finished, and the number of those that
            stopped before the last evaluation.

    Raises:
        InputError: a request cannot be tokenised, is longer than the model's context, or the
            model's parts cannot be found.
        OutOfMemoryError: not even a single request fits into memory.
    """
    layout = resolve(model, hparams)
    templates = [t for group in check(context_templates) for t in group]
    problems = [Problem.of(tokenizer, request, templates) for request in requests]
    limit = context_length(model.config)
    for request, problem in zip(requests, problems, strict=True):
        problem.check_length(request, limit)
    device = home(model)
    outcomes: list[_Outcome | None] = [None] * len(requests)
    if not requests:
        return _targets([], layout.value_width)
    groups = [[e] for e in range(len(requests))]
    if shared_keys == "joint":
        groups = sharing_a_key(problems)
        problems = [Problem.joined([problems[e] for e in group]) for group in groups]
    # Adjacent requests of similar length need little padding.
    order = sorted(range(len(problems)), key=lambda g: (problems[g].shape, g))
    size = batch_size or default_batch_size(device, len(problems), layout.value_width)
    budget = None if batch_size else memory or room_beside(model, layout, hparams.target_layer)
    longest = max(problem.longest for problem in problems)
    whole = why_whole(model, layout) is not None
    # Whole prompts run in the model's own code throughout.
    with frozen(model), nullcontext() if whole else tuned(model, longest):
        optimisation = _Optimisation(
            model,
            layout,
            hparams,
            [(g, problems[g]) for g in order],
            size,
            budget,
            whole=whole,
            free=free,
        )
        for index, outcome in optimisation.run():
            for e in groups[index]:
                outcomes[e] = outcome
            if on_progress:
                count = len(groups[index])
                on_progress(count, count * int(outcome.steps < hparams.v_num_grad_steps))
    return _targets([o for o in outcomes if o is not None], layout.value_width)


@dataclass(frozen=True)
class _Outcome:
    value: torch.Tensor
    attention_value: torch.Tensor
    steps: int
    loss: float
    first_loss: float
    failure: str | None


def _targets(outcomes: Sequence[_Outcome], width: int) -> Targets:
    return Targets(
        torch.stack([o.value for o in outcomes]) if outcomes else torch.empty(0, width),
        torch.tensor([o.steps for o in outcomes], dtype=torch.int32),
        torch.tensor([o.loss for o in outcomes]),
        {e: o.failure for e, o in enumerate(outcomes) if o.failure},
        torch.tensor([o.first_loss for o in outcomes]),
        torch.stack([o.attention_value for o in outcomes]) if outcomes else torch.empty(0, width),
    )


def _prefixes(problems: Sequence[Problem]) -> list[list[tuple[int, ...]]]:
    """For each context, the prefixes that the problems have there."""
    by_context: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for problem in problems:
        for prompt, number in problem.rows:
            by_context[number].append(prompt.prefix)
    return [by_context[number] for number in range(max(by_context) + 1)]


class _Optimisation:
    """Adam on the free vectors of a batch of requests, refilled from a queue.

    Args:
        model: frozen, in evaluation mode.
        layout: the model's layout.
        hparams: the hyper-parameters.
        problems: the problems of all requests, with their numbers, in the order of the queue.
        size: maximum number of requests in the batch.
        memory: bytes that the batch may use; None: ``size`` alone is the limit.
        whole: run prompts whole (`pmet.targets.mechanism`).
        free: the vectors that are optimised.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        hparams: PMETHyperParams,
        problems: Sequence[tuple[int, Problem]],
        size: int,
        memory: int | None = None,
        *,
        whole: bool = False,
        free: Free = "both",
    ) -> None:
        self._model, self._layout, self._hparams = model, layout, hparams
        # The place of the vector that stays zero.
        self._fixed = {"both": None, "ffn": 0, "attention": 1}[free]
        self._size, self._memory = size, memory
        self._footprint: Footprint | None = None
        self._queue = deque(Member(index, problem) for index, problem in problems)
        layer = hparams.target_layer
        self._run: SuffixRun | WholeRun
        if whole:
            self._run = WholeRun(model, layout, layer)
        else:
            filler = PrefixFiller(model, layout, _prefixes([problem for _, problem in problems]))
            self._run = SuffixRun(model, layout, layer, filler)
        self._members: list[Member] = []
        self._state: State | None = None
        self._places: Places | None = None

    def run(self) -> Iterator[tuple[int, _Outcome]]:
        """Evaluate, stop, step, shrink, refill, until every request has stopped."""
        while self._queue or self._members:
            try:
                self._admit()
                outcomes = self._advance()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                outcomes = None
            # Outside the handler: the error keeps the failed evaluation's memory alive.
            if outcomes is None:
                self._retreat()
            else:
                yield from outcomes

    def _admit(self) -> None:
        """Fill the free places, once there are enough to justify a pass over the prefixes."""
        if not self._queue or (self._members and 4 * len(self._members) > 3 * self._size):
            return
        new = [self._queue[i] for i in range(self._room())]
        if not new:
            return
        rows = [pair for member in new for pair in member.problem.rows]
        first_row = 0 if self._places is None else len(self._places.owners_B)
        self._run.add([prompt for prompt, _ in rows], [number for _, number in rows])
        # The bare context comes first; δ is added to its clean outputs.
        starts = list(accumulate((len(m.problem.rows) for m in new[:-1]), initial=first_row))
        clean_EPD = torch.stack([self._run.clean_attention[starts], self._run.clean_ffn[starts]], 1)
        wider = torch.promote_types(clean_EPD.dtype, torch.float32)
        clean_EPD = clean_EPD.to(self._device, wider)
        factor, vocabulary = self._hparams.nll_loss_factor, len(_weight(self._head))
        state = self._state
        for e, member in enumerate(new):
            started = member.state or State.start(clean_EPD[e : e + 1], factor, vocabulary)
            state = state.joined(started) if state else started
        for member in new:
            member.state = None
            self._queue.popleft()
        self._state = state
        self._members += new
        self._places = Places.of([m.problem for m in self._members], clean_EPD.device)

    @property
    def _head(self) -> nn.Module:
        return self._layout.head(self._model)

    def _room(self) -> int:
        """How many waiting requests can enter the batch."""
        free = min(self._size - len(self._members), len(self._queue))
        if self._memory is None:
            return free
        if self._footprint is None:
            # The first one is measured alone.
            return 0 if self._members else 1
        inside = [member.problem for member in self._members]
        waiting = [self._queue[i].problem for i in range(free)]
        fit = 0
        while fit < free:
            new = waiting[: fit + 1]
            if self._footprint.of(inside + new, new) > self._memory:
                break
            fit += 1
        # A single request is tried in any case.
        return fit or int(not inside)

    def _measured(self, saved: int) -> Footprint:
        """The memory of requests, derived from what the first one's evaluation saved."""
        (member,), z, depth = self._members, self._hparams.target_layer, self._layout.depth
        problem = member.problem
        rows = len(problem.prompts)
        suffix, _ = problem.shape
        above = max(1, depth - 1 - z)
        heads, key_heads, width = attention_shape(self._model.config)
        layer = 2 * key_heads * width * _weight(self._head).element_size()
        logits = (problem.read_tokens + 1) * len(_weight(self._head)) * 8
        return Footprint(
            column=layer * above,
            column_below=layer * (z + 1),
            token=max(saved - logits, saved // 4) // (rows * suffix),
            scores=SCORE_BYTES * heads * above,
            vocabulary=len(_weight(self._head)),
            depth=above,
        )

    def _retreat(self) -> None:
        """On exhausted memory, continue with half of the requests; the others re-enter later."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        tried = len(self._members) or self._room()
        if tried <= 1:
            problem = (self._members or self._queue)[0].problem
            suffix, prefix = problem.shape
            raise OutOfMemoryError(
                f"memory cannot hold one request of {len(problem.prompts)} prompts with up to "
                f"{prefix} tokens before the subject's last one and {suffix} from there on; "
                "shorten its prompt, or give the workers more memory"
            )
        self._size = tried // 2
        leaving = self._members[self._size :]
        for e, member in enumerate(leaving, start=self._size):
            member.state = self._held.kept(torch.tensor([e], device=self._device))
        self._queue.extendleft(reversed(leaving))
        if leaving:
            self._leave([e >= self._size for e in range(len(self._members))])

    @property
    def _device(self) -> torch.device:
        return home(self._model)

    @property
    def _held(self) -> State:
        assert self._state is not None, "no request has come in"
        return self._state

    def _advance(self) -> list[tuple[int, _Outcome]]:
        """Evaluate all requests in the batch, and step those that continue.

        If it fails for lack of memory, nothing has changed.
        """
        state, limit = self._held, self._hparams.v_num_grad_steps
        last = [member.evaluations + 1 == limit for member in self._members]
        deltas_EPD = state.deltas_EPD.detach().requires_grad_()
        measuring = self._memory is not None and self._footprint is None
        held = chain(self._model.parameters(), self._run.keys_and_values) if measuring else ()
        count = Count(held)
        with torch.enable_grad(), count.counting() if measuring else nullcontext():
            losses_E, kl_E, greedy_E = self._evaluate(deltas_EPD)
        gradient_EPD = None
        if not all(last):
            (gradient_EPD,) = torch.autograd.grad(losses_E.sum(), deltas_EPD)
        losses_E = losses_E.detach()
        # Read after the backward pass has been launched, so that a GPU does not wait.
        stopped_E = (losses_E < LOSS_ENOUGH) | (greedy_E & (kl_E <= KL_ENOUGH))
        stopped_E |= ~torch.isfinite(losses_E)
        stopped = [a or b for a, b in zip(stopped_E.tolist(), last, strict=True)]
        if measuring:
            self._footprint = self._measured(count.total)
        new = [e for e, member in enumerate(self._members) if not member.evaluations]
        for e, loss in zip(new, losses_E[new].tolist() if new else (), strict=True):
            self._members[e].first_loss = loss
        for member in self._members:
            member.evaluations += 1
        outcomes = self._outcomes(stopped, losses_E) if any(stopped) else []
        if gradient_EPD is not None and not all(stopped):
            full = self._hparams.nll_loss_factor
            state.nll_factor_E = torch.where(greedy_E, NLL_RELIEF * full, full).to(losses_E.dtype)
            if self._fixed is not None:
                gradient_EPD[:, self._fixed] = 0
            self._step(gradient_EPD)
            self._shrink()
        if any(stopped):
            self._leave(stopped)
        return outcomes

    def _evaluate(
        self, deltas_EPD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses, κ·KL and whether the target is the greedy answer everywhere; each (E,)."""
        hparams, places, state = self._hparams, self._places, self._held
        assert places is not None
        deltas_BPD = deltas_EPD.index_select(0, places.owners_B)
        logits_MV = self._run.logits(
            deltas_BPD[:, 0], deltas_BPD[:, 1], places.rows_M, places.columns_M
        )
        log_probs_MV = logits_MV.to(deltas_EPD.dtype).log_softmax(dim=-1)
        after_EV = log_probs_MV[-len(deltas_EPD) :]
        new = [m.evaluations == 0 for m in self._members]
        if any(new):
            state.before_EV[new] = after_EV.detach()[new]
        nll_N = -log_probs_MV[places.read_N, places.labels_N]
        zeros = nll_N.new_zeros(len(deltas_EPD))
        nll_E = zeros.index_add(0, places.owners_N, nll_N * places.shares_N)
        answers_N = log_probs_MV.detach().argmax(1)[places.read_N]
        wrong_N = (answers_N != places.labels_N).to(zeros.dtype)
        greedy_E = zeros.index_add(0, places.owners_N, wrong_N) == 0
        kl_E = hparams.kl_factor * (after_EV.exp() * (after_EV - state.before_EV)).sum(-1)
        size_EP = deltas_EPD.norm(dim=-1) / state.clean_EPD.norm(dim=-1).square()
        losses_E = state.nll_factor_E * nll_E + kl_E + hparams.v_weight_decay * size_EP.sum(-1)
        return losses_E, kl_E.detach(), greedy_E

    def _outcomes(
        self, stopped: Sequence[bool], losses_E: torch.Tensor
    ) -> list[tuple[int, _Outcome]]:
        state = self._held
        attention_ED, values_ED = (state.clean_EPD + state.deltas_EPD).float().cpu().unbind(1)
        losses = losses_E.tolist()
        outcomes = []
        for e, member in enumerate(self._members):
            if not stopped[e]:
                continue
            value, attention_value, failure = values_ED[e].clone(), attention_ED[e].clone(), None
            if not (math.isfinite(losses[e]) and bool(torch.isfinite(value).all())):
                failure = f"the loss is {losses[e]} at evaluation {member.evaluations}"
                value.fill_(torch.nan)
            outcome = _Outcome(
                value,
                attention_value,
                member.evaluations,
                losses[e],
                member.first_loss,
                failure,
            )
            outcomes.append((member.index, outcome))
        return outcomes

    def _step(self, gradient_EPD: torch.Tensor, epsilon: float = 1e-8) -> None:
        """One step of Adam (Kingma & Ba 2015, algorithm 1), β = (0.9, 0.999)."""
        state = self._held
        corrections = [
            (self._hparams.v_lr / (1 - 0.9**m.evaluations), (1 - 0.999**m.evaluations) ** 0.5)
            for m in self._members
        ]
        rate_E, root_E = gradient_EPD.new_tensor(corrections)[:, :, None, None].unbind(1)
        state.mean_EPD.lerp_(gradient_EPD, 1 - 0.9)
        state.square_EPD.mul_(0.999).addcmul_(gradient_EPD, gradient_EPD, value=1 - 0.999)
        denominator = (state.square_EPD.sqrt() / root_E).add_(epsilon)
        state.deltas_EPD = state.deltas_EPD.addcdiv(rate_E * state.mean_EPD, denominator, value=-1)

    def _shrink(self) -> None:
        """Project each δ back onto the ball of radius clamp · ‖v‖."""
        state = self._held
        norm = state.deltas_EPD.norm(dim=-1, keepdim=True)
        radius = self._hparams.clamp_norm_factor * state.clean_EPD.norm(dim=-1, keepdim=True)
        state.deltas_EPD = torch.where(
            norm > radius, state.deltas_EPD * radius / norm, state.deltas_EPD
        )

    def _leave(self, stopped: Sequence[bool]) -> None:
        """Remove the requests that have stopped from everything the next steps compute."""
        assert self._places is not None
        device = self._device
        staying = [e for e, gone in enumerate(stopped) if not gone]
        rows: list[int] = []
        row = 0
        for member, gone in zip(self._members, stopped, strict=True):
            count = len(member.problem.prompts)
            rows += [] if gone else range(row, row + count)
            row += count
        self._run.keep(torch.tensor(rows, dtype=torch.int64, device=device))
        self._members = [self._members[e] for e in staying]
        if not staying:
            self._state = self._places = None
            return
        self._state = self._held.kept(torch.tensor(staying, device=device))
        self._places = Places.of([m.problem for m in self._members], device)


def _weight(module: nn.Module) -> torch.Tensor:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight
