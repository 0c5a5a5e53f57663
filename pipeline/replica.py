"""A worker: one replica of a model, and the stages that need it.

Each method is a stage's work on one shard: what comes in is decided by the job, what goes out does
not depend on who computes it. It runs in a Ray actor or in this process alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save

from pipeline.evaluation import How
from pipeline.finite import check_loaded
from pipeline.metering import tell_gpu_memory
from pipeline.model_cache import model_on_node
from pipeline.schema import targets_table
from pipeline.skeleton import NO_CODE
from pipeline.store import Store
from pmet import contexts, metrics, second_moment
from pmet.architecture import resolve
from pmet.budget import free_memory, room_beside
from pmet.contexts import ContextTemplates
from pmet.continuations import score_continuations
from pmet.devices import share_out
from pmet.errors import NotFiniteError
from pmet.generation import answers, write_on
from pmet.hparams import PMETHyperParams
from pmet.metrics import TextScore
from pmet.prompts import Prompts
from pmet.questions import Score
from pmet.request import EditRequest, SharedKeys
from pmet.targets import compute_targets


@dataclass(frozen=True)
class ModelSource:
    """Which model to open, and how.

    Attributes:
        folder: a model folder that all nodes have, a URL or a hub id; see `pipeline.model_cache`.
        on_gpu: whether to put it on the GPU that the worker was given; on all of several.
        dtype: of the weights: ``auto``, ``float32`` or ``bfloat16``. By default float32 on a CPU,
            where 16-bit arithmetic is slow and coarse, and as stored on a GPU.
        digest: what a copy of the model has to have; None: whatever it has.
    """

    folder: str
    on_gpu: bool
    dtype: str = "auto"
    digest: str | None = None

    def open(self) -> tuple[Any, Any]:
        """The model, for evaluation, and its tokenizer.

        Raises:
            ModelError: the model is not here, or holds values that are not finite.
        """
        dtype = "float32" if self.dtype == "auto" and not self.on_gpu else self.dtype
        folder = str(model_on_node(self.folder, self.digest))
        model = self._placed(open_causal_lm(folder, dtype=dtype))
        check_loaded(folder, model)
        return model, open_tokenizer(folder)

    def _placed(self, model: Any) -> Any:
        """On the GPUs that this process was given, if it is to be on any."""
        if not self.on_gpu:
            return model
        gpus = visible_gpus()
        if len(gpus) < 2:
            return model.to("cuda")
        return share_out(model, gpus, [free_memory(gpu) for gpu in gpus])


def visible_gpus() -> list[torch.device]:
    """The GPUs that Ray has given to this process."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def open_causal_lm(folder: str, *, dtype: torch.dtype | str) -> Any:
    """A causal language model from a local folder: safetensors only, no code of the model's own."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, **NO_CODE
    )
    return model.eval()


def open_tokenizer(folder: str) -> Any:
    """The model's tokenizer, the fast one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)


@dataclass(frozen=True)
class TargetSummary:
    """What became of a shard of targets; the targets themselves are in its file.

    Attributes:
        file: in the run folder.
        sha256: of the file.
        failures: reason by row of the input, for requests that have no target.
        early: requests that stopped before the last evaluation.
        count: requests in the shard.
    """

    file: str
    sha256: str
    failures: dict[int, str]
    early: int
    count: int


@dataclass(frozen=True)
class StoredFile:
    """A file that a worker has written, and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Asked:
    """A part of an evaluation.

    Attributes:
        prompts: each prompt with the targets that are to be scored after it.
        answered: texts whose greedy answers are wanted.
        written: texts that the model is to go on from.
    """

    prompts: list[tuple[str, list[str]]]
    answered: list[str]
    written: list[str]


@dataclass(frozen=True)
class Measured:
    """What a model says to a part of an evaluation, in the same order."""

    scores: list[list[Score]]
    answers: list[str]
    texts: list[str]


def ask(model: Any, tokenizer: Any, how: How, asked: Asked) -> Measured:
    """Ask an open model a part of an evaluation."""
    prompts = Prompts(tokenizer, how.chat_template)
    pairs = [(prompt, target) for prompt, targets in asked.prompts for target in targets]
    scored = score_continuations(model, prompts, pairs)
    seed = how.writing_seed
    return Measured(
        [[scored[prompt, t] for t in targets] for prompt, targets in asked.prompts],
        answers(model, tokenizer, asked.answered, chat_template=how.chat_template),
        [] if seed is None else write_on(model, prompts, asked.written, seed=seed),
    )


class Replica:
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
        """Let the model write its context templates."""
        return contexts.generate(self._model, self._tokenizer, seed=seed)

    def sum_second_moments(
        self,
        source: ModelSource,
        sequences: Sequence[Sequence[int]],
        hparams: PMETHyperParams,
        output: Store,
        name: str,
    ) -> list[StoredFile]:
        """Sum k kᵀ over a part of a corpus; each layer's sum becomes a file of ``output``.

        Returns:
            The files in the order of the layers; their names begin with ``name``, and no other
            attempt at the part uses them.
        """
        self._use(source)
        moments = second_moment.measure_tokens(self._model, sequences, hparams)
        attempt, files = uuid4().hex, []
        for layer, total_KK in moments.sums.items():
            if not torch.stack(total_KK.aminmax()).isfinite().all():
                raise NotFiniteError(
                    f"the second moment of layer {layer} is not finite over {name}: keys of the "
                    "model overflow there"
                )
            file = f"{name}-{layer}-{attempt}.safetensors"
            output.write_bytes(file, save({"sum": total_KK.cpu()}))
            files.append(StoredFile(file, output.sha256(file)))
        return files

    def find_targets(
        self,
        source: ModelSource,
        requests: Sequence[EditRequest],
        rows: Sequence[int],
        hparams: PMETHyperParams,
        templates: ContextTemplates,
        shared_keys: SharedKeys,
        batch_size: int | None,
        share: float,
        output: Store,
        name: str,
    ) -> TargetSummary:
        """Optimise the targets of a shard and write them to a file of ``output``.

        Its name begins with ``name``, and no other attempt at the shard uses it.
        Without a ``batch_size`` it follows from the worker's ``share`` of the free memory.
        """
        self._use(source)
        layout = resolve(self._model, hparams)
        found = compute_targets(
            self._model,
            self._tokenizer,
            requests,
            hparams,
            context_templates=templates,
            shared_keys=shared_keys,
            batch_size=batch_size,
            memory=int(room_beside(self._model, layout, hparams.target_layer) * share),
        )
        first = found.first_losses
        table = targets_table(
            list(rows),
            found.values.numpy(),
            found.steps.numpy(),
            found.losses.numpy(),
            None if first is None else first.numpy(),
        )
        file = f"{name}-{uuid4().hex}.parquet"
        output.write_table(file, table)
        if source.on_gpu:
            tell_gpu_memory("targets")
        return TargetSummary(
            file=file,
            sha256=output.sha256(file),
            failures={rows[i]: reason for i, reason in found.failures.items()},
            early=int((found.steps < hparams.v_num_grad_steps).sum()),
            count=len(found),
        )

    def measure(self, source: ModelSource, how: How, asked: Asked) -> Measured:
        """Ask a model a part of an evaluation; it is opened if it is another one."""
        self._use(source)
        return ask(self._model, self._tokenizer, how, asked)

    def find_known(self, source: ModelSource, requests: Sequence[EditRequest]) -> list[bool]:
        """Tell which requests of a shard a model already answers with their target."""
        self._use(source)
        return metrics.knows(self._model, self._tokenizer, requests)

    def score_texts(self, source: ModelSource, texts: Sequence[str]) -> list[TextScore]:
        """Score ordinary texts on a model: −log p, and the likeliest token at every place."""
        self._use(source)
        return metrics.score_texts(self._model, self._tokenizer, texts)
