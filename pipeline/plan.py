"""The plan of a run: what it will do, resolved and checked before any worker starts.

A bad job stops here, in this process, with one clear message. Of the model, only the
configuration, the tokenizer and the headers of the weight files are read.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data import (
    Corpus,
    Place,
    Rejection,
    RejectionCode,
    RequestTable,
    Shard,
    plan_shards,
    read_requests,
)
from pipeline.errors import JobError, NothingToEditError, StorageError
from pipeline.evaluation import ChatQuestions, Last, check_evaluation
from pipeline.harness import HarnessTasks
from pipeline.hyper_parameters import chosen_hparams
from pipeline.job import JobConfig
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
    quantisation_of,
    stored_weights,
)
from pipeline.places import refuse_overlaps
from pipeline.report import trackers_of
from pipeline.run_folder import refuse_foreign_folder
from pipeline.second_moments import (
    check_moments,
    few,
    is_file_name,
    read_enough,
    refuse_not_finite,
    refuse_too_few,
)
from pipeline.storage import Store, digest_of, read_file
from pmet.endings import Ending
from pmet.errors import RequestError
from pmet.hparams import PMETHyperParams
from pmet.model import Layout, context_length, contexts, evidence
from pmet.request import EditRequest
from pmet.targets import WIDE, Problem, why_whole
from pmet.update import longest, why_read_whole

_LARGEST_SHARD = 256
_SMALLEST_SHARD = 16
_SMALLEST_WIDE_SHARD = 4
_MOST_SMALL_SHARDS = 64
_DIGESTED_ROWS = 4096
# Longer than any token: a text longer than the model's token limit times this is not tokenized.
_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True)
class Plan:
    """A resolved job: everything that decides the result, and how it is split into shards.

    Attributes:
        job: the job as given, with overrides.
        checkpoint: the base model's folder.
        layout: where the model keeps its parts.
        stored: the checkpoint's tensor of each edited layer.
        hparams: the hyper-parameters.
        templates: context templates, if a file names them.
        chat: context templates in the form of chat, if the job learns facts in it.
        ending: what is learned after each target.
        table: the input rows, and which of them can be edited.
        groups: for each accepted request, the number of the group that shares its key. If a group
            gets one target, its requests are adjacent and in one target shard.
        corpus: ordinary text for second moments and perplexity; None if the job names none.
        group_by: input column by which figures are also broken down, or None.
        last: the run to compare figures with, or None.
        questions: the questions to put to a chat model.
        harness: tasks of lm-evaluation-harness, or None.
        target_shards: shards of the accepted requests whose targets are computed together.
        update_shards: shards whose sums are added up together.
        batch_size: requests optimised side by side; None: as many as fit in the workers' memory.
        digests: the inputs that the result depends on, by name.
        parts: what is known about the edited modules and the attention output, by their names.
        whole: why prompts must be run from their first token; None if their beginnings need not.
        origins: where the hyper-parameters are from, and the model, if it was dequantised.
        beside: names in the run folder that the run's caller wrote.
        warnings: what may make the result worse than the user wants.
    """

    job: JobConfig
    checkpoint: Checkpoint
    layout: Layout
    stored: dict[int, StoredTensor]
    hparams: PMETHyperParams
    templates: list[list[str]] | None
    chat: list[str]
    ending: Ending
    table: RequestTable
    groups: array[int]
    corpus: Corpus | None
    group_by: str | None
    last: Last | None
    questions: ChatQuestions
    harness: HarnessTasks | None
    target_shards: list[Shard]
    update_shards: list[Shard]
    batch_size: int | None
    digests: dict[str, str]
    parts: dict[str, str]
    whole: str | None
    origins: dict[str, str]
    beside: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> ModelSource:
        """The unedited model, for the workers."""
        return ModelSource(
            name_for_nodes(self.job.model, self.checkpoint.folder),
            self.job.targets.gpus_per_worker > 0,
            digest=self.digests["model"],
        )

    @property
    def together(self) -> Sequence[int]:
        """The group number of each accepted request; requests of one group get one target."""
        joint = self.job.targets.shared_keys == "joint"
        return self.groups if joint else range(len(self.groups))

    def learned(self, places: Iterable[Place]) -> list[EditRequest]:
        """Accepted requests with the targets to learn."""
        return [self.ending.on(self.table.requests[place]) for place in places]

    @property
    def sharing(self) -> int:
        """The number of accepted requests that share their key with another one."""
        _, counts = np.unique(np.array(self.groups, np.int64), return_counts=True)
        return int(counts[counts > 1].sum())

    @property
    def target_source(self) -> ModelSource:
        """The unedited model, in the dtype that targets are computed in."""
        return replace(self.base, dtype=self.job.targets.dtype)


def make_plan(job: JobConfig, cache_dir: Path | None = None, *, beside: Sequence[str] = ()) -> Plan:
    """Read and check everything that a job names.

    Args:
        job: the job.
        cache_dir: where remote models are copied to.
        beside: names in the run folder that the caller wrote for this run and that it may read.

    Raises:
        InputError: an input cannot be used; the message says what, where, and the remedy.
        StorageError: a file cannot be read.
    """
    refuse_overlaps(job, beside)
    refuse_foreign_folder(Store(job.output), beside)
    trackers_of(job)
    folder = open_model_folder(job.model, cache_dir or default_cache())
    checkpoint = Checkpoint.open(folder)
    check_configuration(checkpoint)
    skeleton, tokenizer = open_skeleton(folder), open_fast_tokenizer(folder)
    hparams, hparams_from = chosen_hparams(
        job.hparams,
        skeleton.config,
        second_moments=job.second_moments,
        digest=lambda: checked_digest(checkpoint),
    )
    quantisation = quantisation_of(folder)
    layout = checked_layout(checkpoint, skeleton, tokenizer, hparams)
    names = [layout.weight_name(layer) for layer in hparams.layers]
    tensors = stored_weights(checkpoint, skeleton, names)
    chat = [] if job.contexts == "completion" else contexts.in_chat(tokenizer)
    ending = Ending.of(job.targets.end, tokenizer)
    templates = _templates(job, chat)
    joint = job.targets.shared_keys == "joint"
    table, groups = _fitting(
        read_requests(job.requests, job.separator),
        tokenizer,
        skeleton.config,
        templates or [["{}"], *([chat] if chat else [])],
        room=0 if templates else contexts.GENERATED_TOKENS + 4,
        ending=ending,
        joint=joint,
    )
    count = len(table.requests)
    if not count:
        reasons = "; ".join(r.reason for r in table.rejected[:3]) or "the files are empty"
        raise NothingToEditError(
            f"none of {len(table.table)} requests can be edited: {reasons}", table.rejected_table()
        )
    digest = checked_digest(checkpoint)
    corpus = _corpus(job, tokenizer, skeleton.config, layout)
    missing = not _has_second_moments(job, layout, hparams.layers, digest)
    if missing and corpus is not None:
        refuse_too_few(corpus.tokens, layout, count)
    columns = table.table.column_names
    evaluation = check_evaluation(job, tokenizer, columns, corpus=corpus is not None)
    harness = HarnessTasks.read(
        job.evaluate.harness,
        tokenizer,
        chat=job.evaluate.chat_template,
        longest=context_length(skeleton.config),
    )
    batch_size = job.targets.batch_size
    return Plan(
        job=job,
        checkpoint=checkpoint,
        layout=layout,
        stored=dict(zip(hparams.layers, tensors, strict=True)),
        hparams=hparams,
        templates=templates,
        chat=chat,
        ending=ending,
        table=table,
        groups=groups,
        corpus=corpus,
        group_by=evaluation.group_by,
        last=evaluation.last,
        questions=evaluation.questions,
        harness=harness,
        target_shards=plan_shards(
            count,
            shard_size(count, job.targets.shard_size, width=layout.value_width),
            groups if joint else None,
        ),
        update_shards=plan_shards(count, shard_size(count, job.update.shard_size)),
        batch_size=None if batch_size == "auto" else batch_size,
        digests={
            "job": job.digest(),
            "model": digest,
            "hparams": digest_of(hparams.model_dump(mode="json")),
            "requests": _table_digest(table.table),
            "corpus": corpus.digest if corpus else "",
            "context_templates": digest_of(templates),
        },
        parts=evidence(skeleton, layout, hparams.target_layer),
        whole=why_whole(skeleton, layout) or why_read_whole(skeleton, layout),
        origins={
            **({"model": quantisation.sentence} if quantisation else {}),
            "hyper-parameters": hparams_from,
        },
        beside=tuple(beside),
        warnings=_warnings(corpus, layout, missing=missing),
    )


def shard_size(count: int, wanted: int | str, *, width: int = 0) -> int:
    """Return the number of requests per shard: ``wanted``, or one derived from count and model.

    The derived number of shards is a power of two up to 64, which divides evenly among most
    numbers of workers, provided that shards are neither too small to fill a batch nor too large
    to lose. A few requests fill a batch of a wide model; there, larger shards would leave workers
    idle at the end, since the longest requests are in the same ones.

    Args:
        count: number of requests.
        wanted: the number that the job gives, or ``auto``.
        width: the model's width, if it matters.
    """
    if isinstance(wanted, int):
        return wanted
    smallest = _SMALLEST_WIDE_SHARD if width >= WIDE else _SMALLEST_SHARD
    number = 1
    while number < _MOST_SMALL_SHARDS and count >= 2 * number * smallest:
        number *= 2
    return min(_LARGEST_SHARD, math.ceil(count / number))


def _templates(job: JobConfig, chat: Sequence[str]) -> list[list[str]] | None:
    if (url := job.context_templates) is None:
        return None
    try:
        text = read_file(url).decode()
    except (StorageError, UnicodeDecodeError) as error:
        raise JobError(f"context_templates: {url} cannot be read ({error}); name a file") from None
    return contexts.combined(contexts.parse(text, source=url), chat, job.contexts)


def _fitting(
    table: RequestTable,
    tokenizer: Any,
    config: Any,
    templates: list[list[str]],
    *,
    room: int,
    ending: Ending,
    joint: bool,
) -> tuple[RequestTable, array[int]]:
    """Set aside the requests that the model cannot read whole, or whose subject has no token.

    The others are sorted by length, longest first: a shard then holds requests of similar
    length, which need little padding; requests that do not fit in memory or take too long show up
    early; and workers finish at about the same time. With a ``joint`` target, requests that share
    a key follow each other, at the position of the longest of them.
    """
    limit = context_length(config)
    flat = [template for group in templates for template in group]
    fitting = array("q")  # places among the accepted requests
    shapes = array("q")
    first: dict[bytes, int] = {}  # of those that fit, by what decides the key
    firsts = array("q")
    rejected = list(table.rejected)
    for place, request in enumerate(table.requests):
        try:
            _check_characters(request, limit)
            problem = Problem.of(tokenizer, ending.on(request), flat)
            problem.check_length(request, None if limit is None else limit - room)
        except RequestError as error:
            rejected.append(Rejection(table.rows[place], str(error), RejectionCode.UNFIT))
        else:
            # A digest, because the tokens of all requests would take several times the memory.
            key = hashlib.sha256(repr(problem.key_tokens).encode()).digest()
            firsts.append(first.setdefault(key, len(fitting)))
            fitting.append(place)
            shapes.extend(problem.shape)
    groups_E = np.array(firsts)
    shapes_E2 = np.array(shapes).reshape(-1, 2)
    if joint:
        longest_E2 = shapes_E2.copy()
        np.maximum.at(longest_E2, groups_E, shapes_E2)
        shapes_E2 = longest_E2[groups_E]
    by_group = groups_E if joint else np.arange(len(groups_E))
    order = np.lexsort((by_group, -shapes_E2[:, 1], -shapes_E2[:, 0]))
    rejected.sort(key=lambda r: r.row)
    chosen = table.chosen([fitting[i] for i in order.tolist()], rejected)
    return chosen, array("q", groups_E[order].tolist())


def _check_characters(request: EditRequest, limit: int | None) -> None:
    """Refuse rows of megabytes at once: tokenizing them would take minutes."""
    characters = len(request.text) + len(request.target_new)
    if limit is not None and characters > limit * _CHARACTERS_PER_TOKEN:
        raise RequestError(
            f"the prompt about {request.subject[:60]!r} has {characters} characters with its "
            f"target, but the model reads {limit} tokens; shorten it"
        )


def _corpus(job: JobConfig, tokenizer: Any, config: Any, layout: Layout) -> Corpus | None:
    if job.corpus is not None:
        wanted = None if job.corpus_tokens == "auto" else job.corpus_tokens
        return read_enough(job.corpus, tokenizer, layout, max_length=longest(config), tokens=wanted)
    if job.second_moments is None:
        raise JobError(
            "the job names neither second_moments nor a corpus; give a folder of second "
            "moments, or Parquet files of ordinary text (column text) to compute them from"
        )
    return None


def _has_second_moments(
    job: JobConfig, layout: Layout, layers: tuple[int, ...], model_digest: str
) -> bool:
    """Whether second moments exist; refuses ones that are not finite or cannot be computed."""
    url = job.second_moments
    if url is None:
        return False
    if check_moments(url, layout, layers, model_digest):
        refuse_not_finite(url, layout, layers)
        return True
    if job.corpus is None:
        raise JobError(
            f"second_moments: there is nothing at {url}, and no corpus to compute them from; "
            "correct the path or give a corpus"
        )
    if is_file_name(url):
        raise JobError(
            f"second_moments: there is no file {url}; correct the path, or name a folder to keep "
            "the second moments computed from the corpus"
        )
    return False


def _warnings(corpus: Corpus | None, layout: Layout, *, missing: bool) -> tuple[str, ...]:
    text = few(corpus.tokens, layout) if missing and corpus is not None else None
    return () if text is None else (text,)


def _table_digest(table: pa.Table) -> str:
    digest = hashlib.sha256(table.schema.serialize())
    # In batches of one size, so that the digest does not depend on how the files were cut.
    for start in range(0, len(table), _DIGESTED_ROWS):
        for batch in table.slice(start, _DIGESTED_ROWS).combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
