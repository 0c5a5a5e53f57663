"""Second moments of a model over a corpus: one pass for all layers, in parts that are summed.

A part is a run of texts. A worker sums a part and writes one file per layer; a small record names
them, so an interrupted pass resumes. When all parts exist, they are merged in order, one layer at a
time, and deleted.

    second_moments.safetensors, second_moments.json     the result; the provenance is written last
    second_moments.parts/<key>-<parts>/
        00000.json                                      a finished part: its files, their digests
        00000-<layer>-<attempt>.safetensors             its sum of k kᵀ, (K, K) float64
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from pipeline.cluster import Task
from pipeline.data import Corpus
from pipeline.errors import JobError
from pipeline.models import (
    Checkpoint,
    ModelSource,
    StoredTensor,
    check_configuration,
    checked_digest,
    checked_layout,
    default_cache,
    name_for_nodes,
    open_fast_tokenizer,
    open_model_folder,
    open_skeleton,
)
from pipeline.progress import Stage
from pipeline.run_folder import PARTS, delete_parts, versions
from pipeline.second_moments.amount import few, read_enough, refuse_too_few
from pipeline.second_moments.files import (
    PROVENANCE,
    TENSORS,
    made_under,
    module_name,
    moments_writer,
    read_header,
)
from pipeline.storage import Store
from pmet.hparams import PMETHyperParams
from pmet.model import Layout
from pmet.update import convergence, longest

_MOST_PARTS = 16
_PART_TOKENS = 8192
_MERGING = 10
"""A token counts as done up to one part in so many when it is summed, the rest when its part is
merged: merging the sums of wide keys takes long."""
_ALL_PARTS_BYTES = 64 * 2**30
"""The disk space for the sums of all parts: there are fewer parts if keys are wide."""

RunTasks = Callable[[str, Sequence[Task], Callable[[Task, Any], None]], None]
"""Runs tasks on workers, as `pipeline.cluster.pool.run_all` does."""
Check = Callable[[str, torch.Tensor], object]
"""Takes a module and its second moment, (K, K) float32."""


@dataclass(frozen=True)
class StoredFile:
    """A file written by a worker, and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class MomentsJob:
    """Everything that second moments depend on.

    Attributes:
        source: the model, for the workers.
        model: digest of its files.
        layout: the model's layout.
        hparams: the layers, and names of modules.
        corpus: the text.
        stored: the dtype of the weights in the model's files.
    """

    source: ModelSource
    model: str
    layout: Layout
    hparams: PMETHyperParams
    corpus: Corpus
    stored: torch.dtype

    @property
    def warning(self) -> str | None:
        """A warning about a corpus that is small for the model's keys, or None."""
        return few(self.corpus.tokens, self.layout)

    @property
    def modules(self) -> list[str]:
        """The modules whose inputs are measured, in layer order."""
        return [module_name(self.layout, layer) for layer in self.hparams.layers]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON."""
        on_gpu = self.source.on_gpu
        return {
            "model": self.model,
            "layers": list(self.hparams.layers),
            "modules": self.modules,
            "corpus": self.corpus.digest,
            "budget": self.corpus.budget,
            "max_length": self.corpus.max_length,
            "dtype": str(self.stored if on_gpu else torch.float32).removeprefix("torch."),
        }

    @property
    def key(self) -> str:
        """SHA-256 of the identity: results and parts with another key are never used."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()

    def parts(self) -> list[list[array[int]]]:
        """Split the corpus into parts: enough to distribute, but no more than fit on the disk."""
        size = len(self.hparams.layers) * 8 * self.layout.key_width**2
        most = min(_MOST_PARTS, self.corpus.tokens // _PART_TOKENS, _ALL_PARTS_BYTES // size)
        # An even number, because the convergence figure compares even with odd parts.
        return self.corpus.parts(2 * max(1, most // 2))


def plan_statistics(
    model: str,
    corpus: Sequence[str],
    hparams: PMETHyperParams,
    *,
    tokens: int | None,
    max_length: int,
    on_gpu: bool,
) -> MomentsJob:
    """Read and check every input of second moments; nothing is started.

    Args:
        model: a folder, a URL or a hub id.
        corpus: Parquet files with a column ``text``.
        hparams: the layers, and names of modules for an unknown family.
        tokens: the token budget; None: enough for the width of the keys.
        max_length: tokens that each text is truncated to, or the model's context if shorter.
        on_gpu: whether workers compute on GPUs, in the stored dtype; otherwise in float32.

    Raises:
        InputError: an input cannot be used; the message says what, where, and the remedy.
        StorageError: a file cannot be read.
    """
    folder = open_model_folder(model, default_cache())
    checkpoint = Checkpoint.open(folder)
    check_configuration(checkpoint)
    skeleton, tokenizer = open_skeleton(folder), open_fast_tokenizer(folder)
    layout = checked_layout(checkpoint, skeleton, tokenizer, hparams)
    limit = longest(skeleton.config, max_length)
    digest = checked_digest(checkpoint)
    read = read_enough(corpus, tokenizer, layout, max_length=limit, tokens=tokens)
    cut = "raise --tokens, or " if read.tokens == tokens else ""
    refuse_too_few(read.tokens, layout, None, more=cut)
    return MomentsJob(
        source=ModelSource(name_for_nodes(model, folder), on_gpu, digest=digest),
        model=digest,
        layout=layout,
        hparams=hparams,
        corpus=read,
        stored=_stored(checkpoint, layout, skeleton, hparams).dtype,
    )


def finished(job: MomentsJob, store: Store) -> dict[str, Any] | None:
    """Return the provenance of these second moments, if the folder holds them.

    Raises:
        JobError: the folder holds others, which are not overwritten.
    """
    if store.exists(PROVENANCE):
        said: dict[str, Any] = store.read_json(PROVENANCE)
        if said.get("key") == job.key and store.exists(TENSORS):
            return said
        changed = [name for name, value in job.identity.items() if said.get(name) != value]
        raise JobError(
            f"output: {store.url} holds other second moments "
            f"({', '.join(changed) or 'its tensors'} changed); name another folder"
        )
    if store.exists(TENSORS) and made_under(read_header(store, TENSORS)) is None:
        raise JobError(
            f"output: {store.join(TENSORS)} exists and does not say how it was made; name "
            "another folder"
        )
    return None


def collect(
    job: MomentsJob, store: Store, run_tasks: RunTasks, bar: Stage, check: Check | None = None
) -> dict[str, Any]:
    """Compute second moments into a folder; finished parts are not repeated.

    Args:
        job: what to compute.
        store: the folder.
        run_tasks: runs the tasks, which call `pipeline.workers.worker.ModelWorker` to sum parts.
        bar: counts tokens.
        check: called with each module and its second moment before the result is complete; it
            may refuse it.

    Returns:
        ``tokens``, ``parts``, how many of them were ``reused``, and ``convergence`` by module.

    Raises:
        WorkerError: a part failed for good; the finished ones are kept.
        JobError: ``check`` refuses a second moment; no second moments are written.
    """
    parts = job.parts()
    folder = f"{PARTS}/{job.key[:16]}-{len(parts)}"
    done = {i: files for i in range(len(parts)) if (files := _recorded(job, store, folder, i))}
    reused = len(done)
    _sum_missing(job, store, folder, parts, done, run_tasks, bar)
    tokens = [sum(map(len, part)) for part in parts]
    moved = _commit(job, store, [done[i] for i in range(len(parts))], tokens, check, bar)
    delete_parts(store)
    return {"tokens": sum(tokens), "parts": len(parts), "reused": reused, "convergence": moved}


def _sum_missing(
    job: MomentsJob,
    store: Store,
    folder: str,
    parts: Sequence[Sequence[array[int]]],
    done: dict[int, list[StoredFile]],
    run_tasks: RunTasks,
    bar: Stage,
) -> None:
    """Have workers sum the parts that are not ``done``, and record each one."""
    bar.skip(sum(_summed(sum(map(len, parts[i]))) for i in done))
    numbers = {f"part {i} of the corpus": i for i in range(len(parts)) if i not in done}

    def take(task: Task, files: list[StoredFile]) -> None:
        number = numbers[task.key]
        record = {"key": job.key, "files": [dataclasses.asdict(file) for file in files]}
        store.write_json(_record(folder, number), record)
        done[number] = files
        bar.advance(_summed(sum(map(len, parts[number]))))
        bar.note(f"{len(done)} of {len(parts)} parts")

    tasks = [
        Task(key, (job.source, parts[i], job.hparams, store, f"{folder}/{i:05}"))
        for key, i in numbers.items()
    ]
    if tasks:
        run_tasks("sum_second_moments", tasks, take)


def _commit(
    job: MomentsJob,
    store: Store,
    parts: Sequence[Sequence[StoredFile]],
    tokens: Sequence[int],
    check: Check | None,
    bar: Stage,
) -> dict[str, float | None]:
    """Merge the parts, write the result and then its provenance; return the convergence."""
    even, odd = sum(tokens[::2]), sum(tokens[1::2])
    left = even + odd - sum(map(_summed, tokens))
    moved: dict[str, float | None] = {}
    with moments_writer(store, job.layout, job.hparams.layers, job.key) as write:
        for i, module in enumerate(job.modules):
            files = [part[i].file for part in parts]
            one_KK, other_KK = (
                _added_up(store, files[half::2], job.layout.key_width) for half in (0, 1)
            )
            moved[module] = convergence(one_KK, other_KK, (even, odd)) if odd else None
            mean_KK = ((one_KK + other_KK) / (even + odd)).float()
            del one_KK, other_KK
            write(mean_KK)
            if check:
                check(module, mean_KK)
            count = len(job.modules)
            bar.advance(left * (i + 1) // count - left * i // count)
            bar.note(f"{i + 1} of {count} layers merged")
    provenance = {
        "key": job.key,
        **job.identity,
        "tokens": even + odd,
        "texts": len(job.corpus.texts),
        "files": job.corpus.files,
        "parts": len(parts),
        "convergence": moved,
        "versions": versions(),
    }
    store.write_json(PROVENANCE, provenance)
    return moved


def _summed(tokens: int) -> int:
    """How many of a part's tokens count as done before it is merged."""
    return tokens - tokens // _MERGING


def _added_up(store: Store, files: Sequence[str], width: int) -> torch.Tensor:
    """The parts' sums at one layer, added in order, (K, K) float64."""
    total_KK = torch.zeros(width, width, dtype=torch.float64)
    for file in files:
        total_KK += load(store.read_bytes(file))["sum"]
    return total_KK


def _recorded(job: MomentsJob, store: Store, folder: str, number: int) -> list[StoredFile] | None:
    """The files of a finished part; None if one is missing or incomplete."""
    name = _record(folder, number)
    if not store.exists(name):
        return None
    record = store.read_json(name)
    if record.get("key") != job.key:
        return None
    files = [StoredFile(**file) for file in record["files"]]
    whole = all(store.exists(f.file) and store.sha256(f.file) == f.sha256 for f in files)
    return files if whole else None


def _record(folder: str, number: int) -> str:
    return f"{folder}/{number:05}.json"


def _stored(
    checkpoint: Checkpoint, layout: Layout, skeleton: Any, hparams: PMETHyperParams
) -> StoredTensor:
    prefix = getattr(skeleton, "base_model_prefix", "")
    return checkpoint.find(layout.weight_name(hparams.target_layer), prefix)
