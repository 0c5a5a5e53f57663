"""A worker: one replica of a model, and the stages that use it.

Each method does a stage's work on one shard: the job decides its input, and its output does not
depend on which worker computes it. It runs in a Ray actor or in this process alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save

from pipeline.cluster import tell_gpu_memory
from pipeline.data import Row, targets_table
from pipeline.evaluation import How
from pipeline.harness import Answer, Part, answer
from pipeline.models import ModelSource
from pipeline.second_moments import StoredFile
from pipeline.storage import Store
from pmet.errors import NotFiniteError
from pmet.evaluation import (
    Answered,
    Continuation,
    Prompts,
    Questions,
    Said,
    Score,
    TextScore,
    ask_questions,
    metrics,
    score_continuations,
    write_on,
)
from pmet.hparams import PMETHyperParams
from pmet.inspection import (
    NOISE,
    Optimised,
    State,
    Statement,
    Trace,
    embedding_deviation,
    optimise_and_compare,
    trace,
)
from pmet.model import ContextTemplates, Layout, contexts, resolve
from pmet.request import EditRequest, SharedKeys
from pmet.targets import compute_targets, room_beside
from pmet.update import second_moments


@dataclass(frozen=True)
class TargetTask:
    """Requests whose targets are optimised together, and everything that decides the result.

    Attributes:
        source: the model.
        requests: the requests, E of them.
        rows: (E,) input row of each request.
        hparams: hyper-parameters.
        templates: context templates.
        shared_keys: how to handle requests that share a key.
        batch_size: requests in a batch; None: as many as fit in the worker's memory.
        memory_share: the share of the free memory that this worker may use, in (0, 1].
        output: the run folder that the file is written to.
        name: prefix of the file's name.
    """

    source: ModelSource
    requests: Sequence[EditRequest]
    rows: Sequence[Row]
    hparams: PMETHyperParams
    templates: ContextTemplates
    shared_keys: SharedKeys
    batch_size: int | None
    memory_share: float
    output: Store
    name: str


@dataclass(frozen=True)
class TargetSummary:
    """The outcome of a shard of targets; the targets themselves are in its file.

    Attributes:
        file: in the run folder.
        sha256: of the file.
        failures: reason by input row, for requests that have no target.
        early: requests that stopped before the last evaluation.
        count: requests in the shard.
    """

    file: str
    sha256: str
    failures: dict[Row, str]
    early: int
    count: int


@dataclass(frozen=True)
class TraceTask:
    """Facts to trace, and everything that decides the result.

    Attributes:
        source: the model.
        layout: its layout.
        statements: the facts' prompts with their true objects.
        states: what to restore.
        subjects: tokens whose embeddings decide how strong the noise is.
        samples: noise samples for each fact.
        seed: of the noise.
    """

    source: ModelSource
    layout: Layout
    statements: Sequence[Statement]
    states: Sequence[State]
    subjects: Sequence[int]
    samples: int
    seed: int


@dataclass(frozen=True)
class Asked:
    """A part of an evaluation.

    Attributes:
        prompts: for each prompt, its continuations to score.
        written: texts for the model to continue.
        questions: prompts for it to answer in its own words.
        drafts: answers of the base model to some of them that it may give as well.
    """

    prompts: list[list[Continuation]]
    written: list[str] = field(default_factory=list)
    questions: Questions = field(default_factory=Questions)
    drafts: Mapping[str, Said] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A model's answers to a part of an evaluation, in the same order."""

    scores: list[list[Score]]
    texts: list[str]
    answered: Answered


def ask(model: Any, tokenizer: Any, how: How, asked: Asked) -> Measured:
    """Ask an open model the questions of a part of an evaluation."""
    prompts = Prompts(tokenizer, how.chat_template)
    scored = score_continuations(model, prompts, [pair for own in asked.prompts for pair in own])
    seed = how.writing_seed
    return Measured(
        [[scored[pair] for pair in own] for own in asked.prompts],
        [] if seed is None else write_on(model, prompts, asked.written, seed=seed),
        ask_questions(model, prompts, asked.questions, asked.drafts),
    )


class ModelWorker:
    """Holds one model at a time, and computes shards with it."""

    def __init__(self, source: ModelSource) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._source: ModelSource | None = None
        self._use(source)

    def _use(self, source: ModelSource) -> None:
        if source != self._source:
            self._model = self._tokenizer = None
            self._model, self._tokenizer = source.open()
            self._source = source

    def write_templates(self, seed: int) -> list[list[str]]:
        """Generate context templates with the model."""
        return contexts.generate(self._model, self._tokenizer, seed=seed)

    def sum_second_moments(
        self,
        source: ModelSource,
        sequences: Sequence[Sequence[int]],
        hparams: PMETHyperParams,
        output: Store,
        name: str,
    ) -> list[StoredFile]:
        """Sum k kᵀ over a part of a corpus; each layer's sum is written to a file in ``output``.

        Returns:
            The files in layer order; their names begin with ``name``, and no other attempt at the
            part uses them.
        """
        self._use(source)
        moments = second_moments.measure_tokens(self._model, sequences, hparams)
        attempt, files = uuid4().hex, []
        for layer, total_KK in moments.sums.items():
            if not torch.stack(total_KK.aminmax()).isfinite().all():
                raise NotFiniteError(
                    f"the second moment of layer {layer} is not finite over {name}: keys of the "
                    "model overflow there"
                )
            file = f"{name}-{layer}-{attempt}.safetensors"
            sums = {"sum": total_KK.cpu()}
            if layer in moments.routed:
                sums["routed"] = moments.routed[layer].cpu()
            output.write_bytes(file, save(sums))
            files.append(StoredFile(file, output.sha256(file)))
        return files

    def find_targets(self, task: TargetTask) -> TargetSummary:
        """Optimise the targets of a task's requests and write them to a file.

        No other attempt at the task uses the file's name.
        """
        self._use(task.source)
        layout = resolve(self._model, task.hparams)
        room = room_beside(self._model, layout, task.hparams.target_layer)
        found = compute_targets(
            self._model,
            self._tokenizer,
            task.requests,
            task.hparams,
            context_templates=task.templates,
            shared_keys=task.shared_keys,
            batch_size=task.batch_size,
            memory=int(room * task.memory_share),
        )
        first = found.first_losses
        table = targets_table(
            list(task.rows),
            found.values.numpy(),
            found.steps.numpy(),
            found.losses.numpy(),
            None if first is None else first.numpy(),
        )
        file = f"{task.name}-{uuid4().hex}.parquet"
        task.output.write_table(file, table)
        if task.source.on_gpu:
            tell_gpu_memory("targets")
        return TargetSummary(
            file=file,
            sha256=task.output.sha256(file),
            failures={task.rows[i]: reason for i, reason in found.failures.items()},
            early=int((found.steps < task.hparams.v_num_grad_steps).sum()),
            count=len(found),
        )

    def trace(self, task: TraceTask) -> list[Trace]:
        """Trace the facts of a task."""
        self._use(task.source)
        deviation = NOISE * embedding_deviation(self._model, task.subjects)
        return trace(
            self._model,
            task.layout,
            task.statements,
            task.states,
            deviation=deviation,
            samples=task.samples,
            seed=task.seed,
        )

    def optimise_and_compare(
        self,
        source: ModelSource,
        requests: Sequence[EditRequest],
        hparams: PMETHyperParams,
        templates: ContextTemplates,
    ) -> list[Optimised]:
        """Optimise the free vectors of requests, and compare the model's states."""
        self._use(source)
        return optimise_and_compare(
            self._model, self._tokenizer, requests, hparams, context_templates=templates
        )

    def measure(self, source: ModelSource, how: How, asked: Asked) -> Measured:
        """Measure a part of an evaluation on a model, which is opened if it is another one."""
        self._use(source)
        return ask(self._model, self._tokenizer, how, asked)

    def answer_harness(self, source: ModelSource, part: Part) -> list[Answer]:
        """Answer requests of lm-evaluation-harness, in their order."""
        self._use(source)
        return answer(self._model, self._tokenizer, part)

    def find_known(self, source: ModelSource, requests: Sequence[EditRequest]) -> list[bool]:
        """Return which requests of a shard a model already answers with their target."""
        self._use(source)
        return metrics.knows(self._model, self._tokenizer, requests)

    def score_texts(self, source: ModelSource, texts: Sequence[str]) -> list[TextScore]:
        """Score ordinary texts on a model: −log p, and the most likely token at every position."""
        self._use(source)
        return metrics.score_texts(self._model, self._tokenizer, texts)
