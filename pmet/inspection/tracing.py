"""Causal tracing: which states at the subject's last token bring a forgotten fact back.

A model that knows a fact forgets it if noise is added to the embeddings of the subject's tokens,
three standard deviations of them (Meng et al. 2022, "Locating and Editing Factual Associations in
GPT", section 2). Then one state of the clean run is restored at the subject's last token: a layer's
hidden state, or the output of its FFN or its attention, or those of a window of neighboring layers.
By how much the true object's probability rises is the indirect effect of that state.

All states, noise samples and several facts are run side by side. Below the lowest restored layer a
pass is that of the corrupted run, so it starts there, from that run's hidden states.

Shape letters: F facts, S noise samples, B rows, T tokens, D model width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pmet.inspection.passes import PARTS, Part, Rows, Site, Statement, noting, putting, sites_of
from pmet.model import (
    Layout,
    captured_input,
    changed_input,
    changed_output,
    form_of,
    frozen,
    home,
    passing,
    replaced,
)
from pmet.targets import why_whole

NOISE = 3.0
"""Standard deviations of the embeddings that the noise has."""
SAMPLES = 5
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class State:
    """What is restored together: a part of some neighboring layers.

    Attributes:
        part: the part.
        layers: the layers, ascending.
    """

    part: Part
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """The trace of one fact; probabilities of its true object, means over noise samples.

    Attributes:
        known: whether the true object is the model's answer; otherwise nothing was traced.
        clean: with the prompt as it is.
        corrupted: with noise on the subject.
        restored: with noise on the subject and one state restored, by state.
    """

    known: bool
    clean: float
    corrupted: float = 0.0
    restored: tuple[float, ...] = ()


def states_to_trace(model: nn.Module, layout: Layout, width: int) -> list[State]:
    """All single states, and all windows of ``width`` FFN and attention outputs.

    Layers without a part (of another kind than the edited ones) have no state of it. A model on
    *meta* will do.
    """
    sites = sites_of(model, layout)
    windows = [tuple(range(i, i + n)) for n in (1, width) for i in range(layout.depth - n + 1)]
    return [
        State(part, window)
        for part in PARTS
        for window in dict.fromkeys(windows)
        if (part != "hidden" or len(window) == 1) and all((part, i) in sites for i in window)
    ]


@torch.no_grad()
def embedding_deviation(model: nn.Module, tokens: Sequence[int]) -> float:
    """The standard deviation of the embeddings of tokens, over all of their values."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.tensor(list(tokens), device=home(model))
    return float(embeddings(ids[None]).float().std())


def trace(
    model: nn.Module,
    layout: Layout,
    statements: Sequence[Statement],
    states: Sequence[State],
    *,
    deviation: float,
    samples: int = SAMPLES,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Trace]:
    """Trace facts.

    Args:
        model: a causal language model; left unchanged.
        layout: its layout.
        statements: the facts' prompts with their true objects.
        states: what to restore, each in turn.
        deviation: the noise's standard deviation.
        samples: S, noise samples for each fact. They depend on the seed and the fact alone.
        seed: of the noise.
        batch_tokens: tokens that are run side by side, about; affects only speed and memory.
    """
    traces: dict[int, Trace] = {}
    with torch.no_grad(), frozen(model):
        tracer = _Tracer(
            model,
            layout,
            states,
            deviation=deviation,
            samples=samples,
            seed=seed,
            batch_tokens=batch_tokens,
        )
        for block in _blocks(statements, samples, batch_tokens):
            traces |= zip(block, tracer.traced([statements[f] for f in block]), strict=True)
    return [traces[f] for f in range(len(statements))]


def _blocks(
    statements: Sequence[Statement], samples: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Facts to trace side by side, those of similar length together."""
    block: list[int] = []
    for f in sorted(range(len(statements)), key=lambda f: len(statements[f].ids)):
        if block and (len(block) + 1) * samples * len(statements[f].ids) > batch_tokens:
            yield block
            block = []
        block.append(f)
    if block:
        yield block


def noise_for(statement: Statement, width: int, *, samples: int, seed: int) -> torch.Tensor:
    """Standard normal noise (S, subject's tokens, D) for a fact, drawn for this fact alone."""
    digest = hashlib.sha256(repr((seed, statement.ids, statement.first)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(samples, len(statement.subject), width, generator=generator)


@dataclass(frozen=True)
class _Corrupted:
    """The corrupted run of some facts, S rows each.

    Attributes:
        noise_BTD: what was added to the embeddings.
        inputs: the hidden states (B, T, D) that each layer reads.
        forms: the form of each layer's output.
        probability_B: the true object's.
    """

    noise_BTD: torch.Tensor
    inputs: list[torch.Tensor]
    forms: list[Any]
    probability_B: torch.Tensor


class _Tracer:
    """Traces facts side by side; see `trace` for its arguments."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        states: Sequence[State],
        *,
        deviation: float,
        samples: int,
        seed: int,
        batch_tokens: int,
    ) -> None:
        self._model, self._layout, self._states = model, layout, states
        self._deviation, self._samples, self._seed = deviation, samples, seed
        self._batch_tokens = batch_tokens
        self._sites = sites_of(model, layout)
        self._layers = [layout.layer(model, i) for i in range(layout.depth)]
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._embeddings = embeddings
        # Whether a pass can start at any layer from its hidden states is tried on a small copy.
        self._whole = why_whole(model, layout) is not None

    def traced(self, statements: Sequence[Statement]) -> list[Trace]:
        """The traces of facts that fit side by side."""
        rows = Rows(self._model, self._layout, statements)
        with noting(self._sites, rows.lasts_B) as clean:
            clean_F, known_F = rows.run()
        kept = known_F.nonzero()[:, 0].tolist()
        traces = [Trace(False, p) for p in clean_F.tolist()]
        if not kept:
            return traces
        known = [statements[f] for f in kept]
        rows_F = torch.tensor(kept, device=known_F.device)
        held = {site: values[rows_F.to(values.device)] for site, values in clean.items()}
        corrupted = self._corrupted(known)
        restored_FN = self._restored(known, held, corrupted)
        before_F = corrupted.probability_B.view(len(known), -1).mean(1)
        for f, before, restored_N in zip(kept, before_F.tolist(), restored_FN, strict=True):
            traces[f] = Trace(True, traces[f].clean, before, tuple(restored_N.tolist()))
        return traces

    def _corrupted(self, statements: Sequence[Statement]) -> _Corrupted:
        each = [s for s in statements for _ in range(self._samples)]
        rows = Rows(self._model, self._layout, each)
        noise_BTD = self._noise(statements, rows.ids_BT.shape[1])
        with ExitStack() as stack:
            stack.enter_context(self._noisy(noise_BTD))
            inputs = [stack.enter_context(captured_input(layer)) for layer in self._layers]
            forms = [stack.enter_context(_form_noted(layer)) for layer in self._layers]
            probability_B, _ = rows.run()
        return _Corrupted(
            noise_BTD,
            [seen.tensor for seen in inputs],
            [form for (form,) in forms],
            probability_B,
        )

    def _noise(self, statements: Sequence[Statement], columns: int) -> torch.Tensor:
        """Noise (F · S, T, D) on the subjects' tokens, zero elsewhere."""
        # Some embeddings are narrower than the model (OPT).
        width, samples = self._embeddings.weight.shape[1], self._samples
        noise_FSTD = torch.zeros(len(statements), samples, columns, width)
        for own, statement in zip(noise_FSTD, statements, strict=True):
            own[:, statement.first : statement.last + 1] = noise_for(
                statement, width, samples=samples, seed=self._seed
            )
        return (self._deviation * noise_FSTD).flatten(0, 1).to(home(self._model))

    def _noisy(self, noise_BTD: torch.Tensor) -> Any:
        return changed_output(
            self._embeddings, lambda output: output + noise_BTD.to(output.device, output.dtype)
        )

    def _restored(
        self,
        statements: Sequence[Statement],
        clean: dict[Site, torch.Tensor],
        corrupted: _Corrupted,
    ) -> torch.Tensor:
        """The true objects' probabilities (F, states), each with one state restored."""
        facts, samples = len(statements), self._samples
        # Rows that start at one layer follow each other.
        order = sorted(range(len(self._states)), key=lambda n: self._states[n].layers[0])
        todo = [(n, b) for n in order for b in range(facts * samples)]
        size = max(1, self._batch_tokens // max(len(s.ids) for s in statements))
        found = torch.zeros(len(self._states), facts * samples)
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            numbers, rows_B = (torch.tensor(column) for column in zip(*batch, strict=True))
            found[numbers, rows_B] = self._run(batch, statements, clean, corrupted).float().cpu()
        return found.view(len(self._states), facts, samples).mean(2).T

    def _run(
        self,
        batch: Sequence[tuple[int, int]],
        statements: Sequence[Statement],
        clean: dict[Site, torch.Tensor],
        corrupted: _Corrupted,
    ) -> torch.Tensor:
        """The probabilities of a batch of (state, row of the corrupted run)."""
        facts = [b // self._samples for _, b in batch]
        rows = Rows(self._model, self._layout, [statements[f] for f in facts])
        columns = rows.ids_BT.shape[1]
        taken = torch.tensor([b for _, b in batch], device=rows.ids_BT.device)
        with ExitStack() as stack:
            if self._whole:
                stack.enter_context(self._noisy(corrupted.noise_BTD[taken, :columns]))
            else:
                start = min(self._states[n].layers[0] for n, _ in batch)
                for layer, form in zip(self._layers[:start], corrupted.forms, strict=False):
                    stack.enter_context(replaced(layer, passing(form)))
                inputs = corrupted.inputs[start]
                hidden = inputs[taken.to(inputs.device), :columns]
                stack.enter_context(changed_input(self._layers[start], lambda _: hidden))
            for site, places in self._places(batch).items():
                values = clean[site]
                own = torch.tensor([facts[place] for place in places], device=values.device)
                here = rows.lasts_B[torch.tensor(places, device=rows.lasts_B.device)]
                stack.enter_context(putting(self._sites[site], here, values[own]))
            probability_B, _ = rows.run()
        return probability_B

    def _places(self, batch: Sequence[tuple[int, int]]) -> dict[Site, list[int]]:
        """The rows in which each part of a layer is restored."""
        places: dict[Site, list[int]] = {}
        for row, (n, _) in enumerate(batch):
            for layer in self._states[n].layers:
                places.setdefault((self._states[n].part, layer), []).append(row)
        return places


@contextmanager
def _form_noted(module: nn.Module) -> Iterator[list[Any]]:
    """Note the form of a module's output, without its tensors."""
    noted: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _a, output: noted.append(form_of(output)))
    try:
        yield noted
    finally:
        handle.remove()
