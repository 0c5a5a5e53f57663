"""The stage that finds the targets: shards go to workers, files and records to the run folder.

A shard whose worker fails repeatedly is split until the requests that cause it are found
(`pipeline.stages.isolation`); its file then holds the targets of the others. If the job names a
store of targets, only the targets missing from it are computed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster import Task
from pipeline.data import Place, Row, Shard, read_targets, targets_table
from pipeline.errors import NoEditError, StorageError
from pipeline.events import EventKind, StageName
from pipeline.failures import Failure, FailureKind
from pipeline.progress import Stage
from pipeline.stages.context import Context, FoundTargets
from pipeline.stages.isolation import Piece, isolate, most_isolated
from pipeline.stages.target_store import TargetStore
from pipeline.stages.update import expect_update
from pipeline.workers import TargetSummary, TargetTask

FOLDER = "targets"
_REASONS_NAMED = 3
WORTH_A_WORKER = 16
"""Fewer requests than this are optimised faster than another worker can start."""


def find_targets(
    run: Context, templates: list[list[str]], known: frozenset[Row] = frozenset()
) -> FoundTargets:
    """Find the targets of all requests, one file per shard; finished shards are not repeated.

    Args:
        run: the run.
        templates: context templates.
        known: input rows that need no target. They are left out of their shards, whose bounds stay
            unchanged: the contents of a shard depend only on the job and its model.

    Raises:
        WorkerError: no worker can start, or more requests fail than may be set aside.
    """
    plan = run.plan
    found, todo, isolated = FoundTargets(known=known), [], 0
    for shard in plan.target_shards:
        if record := run.folder.recorded(_record(shard)):
            _note(found, shard, record)
            isolated += len(record["isolated"])
        else:
            todo.append(shard)
    with run.stage(StageName.TARGETS, len(plan.table.requests)) as (bar, detail):
        bar.skip(len(plan.table.requests) - sum(map(len, todo)))
        detail |= {
            "shards": len(todo),
            "finished": 0,
            "reused": len(plan.target_shards) - len(todo),
            "shared_keys": plan.sharing,
            "early": 0,
            "found": 0,
            "isolated": isolated,
        }
        if todo:
            _Search(run, templates, found, bar, detail).complete(todo)
    return found


def refuse_without_edits(run: Context, found: FoundTargets) -> NoReturn:
    """End a run in which no request has a target: it would publish the base unchanged.

    Records of the targets are deleted, so the same run recomputes them once the cause is fixed.

    Raises:
        NoEditError: always, with the most frequent reasons.
    """
    wanted = [row for row in run.plan.table.rows if row not in found.known]
    run.folder.forget(*(_record(shard) for shard in run.plan.target_shards))
    reasons = Counter(found.failures[row] for row in wanted).most_common(_REASONS_NAMED)
    named = "; ".join(f"{reason} ({count:,} of {len(wanted):,})" for reason, count in reasons)
    raise NoEditError(
        f"no fact was edited: none of {len(wanted):,} requests has a target, and nothing was "
        f"published. The most frequent reasons: {named}. Check the model, and v_lr and "
        "clamp_norm_factor in the hyper-parameters; the same command computes the targets again"
    )


@dataclass
class _Work:
    """An unfinished shard: the parts that exist, and the requests still missing."""

    shard: Shard
    missing: set[Place]
    stored: int = 0
    parts: list[TargetSummary] = field(default_factory=list)
    isolated: dict[Row, str] = field(default_factory=dict)


class _Search:
    """Computes the missing shards, and commits each when it is complete."""

    def __init__(
        self,
        run: Context,
        templates: list[list[str]],
        found: FoundTargets,
        bar: Stage,
        detail: dict[str, Any],
    ) -> None:
        self._run, self._templates, self._found = run, templates, found
        self._bar, self._detail = bar, detail
        self._works: dict[int, _Work] = {}
        self._kept = TargetStore.of(run.plan, templates)
        self._start = time.monotonic()

    def complete(self, shards: Sequence[Shard]) -> None:
        """Find the targets of these shards."""
        self._works = {s.index: _Work(s, set(s.places)) for s in shards}
        self._leave_out_known()
        if self._kept is not None:
            self._take_stored(self._kept)
        pieces = self._pieces()
        failed = self._compute(pieces) if pieces else {}
        if failed:
            _refuse_if_storage_fails(failed)
            # Fresh workers, unaffected by earlier failures.
            self._run.executor.release()
            wanted = len(self._run.plan.table.requests) - len(self._found.known)
            limit = most_isolated(wanted) - self._detail["isolated"]
            isolate(failed, self._isolating, self._set_aside, limit)

    def _leave_out_known(self) -> None:
        rows = self._run.plan.table.rows
        for work in list(self._works.values()):
            self._settle(work, [p for p in work.missing if rows[p] in self._found.known])

    def _pieces(self) -> list[Piece]:
        """The pieces to compute: whole shards, and the remainders of several shards together.

        If one fact in a hundred changes overnight, no shard lacks more than a few targets, and a
        batch is only fast if it is large.
        """
        works = list(self._works.values())
        most = min(WORTH_A_WORKER, max((len(work.shard) for work in works), default=0))
        pieces: list[list[_Work]] = []
        room = 0
        for work in works:
            few = len(work.missing) < len(work.shard)
            if few and len(work.missing) <= room:
                pieces[-1].append(work)
                room -= len(work.missing)
            else:
                pieces.append([work])
                room = most - len(work.missing) if few else 0
        return [self._piece(together) for together in pieces]

    def _piece(self, works: Sequence[_Work]) -> Piece:
        places = tuple(place for work in works for place in sorted(work.missing))
        return Piece(tuple(work.shard for work in works), places, self._groups(places))

    def _groups(self, places: Sequence[Place]) -> tuple[int, ...]:
        together = self._run.plan.together
        return tuple(together[place] for place in places)

    def _take_stored(self, kept: TargetStore) -> None:
        """Take the targets that earlier runs have stored; the rest is still to be computed."""
        self._detail["stored"] = 0
        table, works = self._run.plan.table, list(self._works.values())
        keys: dict[Place, str] = {}
        for work in works:
            places = sorted(work.missing)
            requests = self._run.plan.learned(places)
            keys |= zip(places, kept.keys(requests, self._groups(places)), strict=True)
        together = self._run.plan.together
        with kept.lookup(list(keys.values())) as stored:
            for work in works:
                # A group is computed as a whole, or not at all.
                lacking = {together[p] for p in work.missing if keys[p] not in stored}
                there = [place for place in sorted(work.missing) if together[place] not in lacking]
                if there:
                    rows = [table.rows[place] for place in there]
                    arrays = stored.arrays([keys[place] for place in there], rows)
                    self._take_part(work, targets_table(*arrays))
                    work.stored = len(there)
                    self._detail["stored"] += len(there)
                    self._settle(work, there)

    def _take_part(
        self, work: _Work, table: pa.Table, failures: Mapping[Row, str] | None = None
    ) -> None:
        file = f"{FOLDER}/{work.shard.name}-{uuid4().hex}.parquet"
        store = self._run.store
        store.write_table(file, table)
        digest = store.sha256(file)
        work.parts.append(TargetSummary(file, digest, dict(failures or {}), 0, len(table)))

    def _isolating(self, pieces: Sequence[Piece]) -> dict[Piece, Failure]:
        return self._compute(pieces, isolating=True)

    def _compute(self, pieces: Sequence[Piece], *, isolating: bool = False) -> dict[Piece, Failure]:
        """Compute pieces; return the failure of each piece that failed for good."""
        by_key = {str(piece): piece for piece in pieces}
        tasks = [
            Task(
                key,
                (self._task(piece),),
                attempts=piece.attempts if isolating else None,
                shard=piece.name,
            )
            for key, piece in by_key.items()
        ]
        wanted = sum(len(piece.places) for piece in pieces)
        if wanted <= WORTH_A_WORKER and not isolating:
            self._expect_update()
        failed = self._run.executor.try_all(
            "find_targets",
            tasks,
            lambda task, summary: self._take(by_key[task.key], summary),
            workers=len(tasks) if isolating else -(-wanted // WORTH_A_WORKER),
            on_drained=None if isolating else self._expect_update,
        )
        return {by_key[f.task.key]: f.failure for f in failed}

    def _expect_update(self) -> None:
        expect_update(self._run, self._templates)

    def _task(self, piece: Piece) -> TargetTask:
        plan = self._run.plan
        return TargetTask(
            source=plan.target_source,
            requests=plan.learned(piece.places),
            rows=[plan.table.rows[place] for place in piece.places],
            hparams=plan.hparams,
            templates=self._templates,
            shared_keys=plan.job.targets.shared_keys,
            batch_size=plan.batch_size,
            memory_share=min(1.0, plan.job.targets.gpus_per_worker or 1.0),
            output=self._run.store,
            name=f"{FOLDER}/{piece.name}",
        )

    def _take(self, piece: Piece, summary: TargetSummary) -> None:
        if self._kept is not None:
            requests = self._run.plan.learned(piece.places)
            found = read_targets(self._run.store.read_table(summary.file))
            self._kept.write(requests, found, piece.groups)
        self._detail["early"] += summary.early
        self._detail["found"] += summary.count
        rate = self._detail["found"] / (time.monotonic() - self._start)
        self._bar.note(f"{rate:.3g} targets/s, {self._detail['early']} stopped early")
        if len(piece.shards) == 1:
            work = self._works[piece.shards[0].index]
            work.parts.append(summary)
            self._settle(work, piece.places)
        else:
            self._share_out(piece, summary)

    def _share_out(self, piece: Piece, summary: TargetSummary) -> None:
        """Give each shard its share of the targets that were computed for several."""
        table, rows = self._run.store.read_table(summary.file), self._run.plan.table.rows
        for shard in piece.shards:
            work = self._works[shard.index]
            places = [place for place in piece.places if shard.start <= place < shard.stop]
            own = {rows[place] for place in places}
            failures = {row: why for row, why in summary.failures.items() if row in own}
            there = pc.is_in(table.column("row"), pa.array(own, table.column("row").type))
            self._take_part(work, table.filter(there), failures)
            self._settle(work, places)

    def _set_aside(self, piece: Piece, failure: Failure) -> None:
        (shard,), (place,) = piece.shards, piece.places
        work = self._works[shard.index]
        row = self._run.plan.table.rows[place]
        text = f"it fails on every worker, even alone ({failure})"
        work.isolated[row] = text
        self._detail["isolated"] += 1
        self._run.event(EventKind.ISOLATED, f"row {row} is set aside: {text}", shard=shard.name)
        self._settle(work, piece.places)

    def _settle(self, work: _Work, places: Sequence[Place]) -> None:
        self._bar.advance(len(places))
        work.missing -= set(places)
        if not work.missing:
            self._commit(self._works.pop(work.shard.index))

    def _commit(self, work: _Work) -> None:
        failures = {row: why for part in work.parts for row, why in part.failures.items()}
        if len(work.parts) != 1:
            merged = self._merged(work)
            work.parts.clear()
            self._take_part(work, merged)
        (whole,) = work.parts
        record = {
            "file": whole.file,
            "sha256": whole.sha256,
            "rows": whole.count,
            "stored": work.stored,
            "failures": {str(row): why for row, why in (failures | work.isolated).items()},
            "isolated": sorted(work.isolated),
        }
        self._run.folder.record(_record(work.shard), record)
        self._detail["finished"] += 1
        self._bar.shard(work.shard.name)
        _note(self._found, work.shard, record)

    def _merged(self, work: _Work) -> pa.Table:
        """The targets of a shard that was computed in parts, in the order of its requests."""
        width = self._run.plan.layout.value_width
        tables = [self._run.store.read_table(part.file) for part in work.parts]
        tables.append(targets_table([], np.empty((0, width), np.float32), [], []))
        table = pa.concat_tables(tables)
        shard = work.shard
        order = {
            row: i for i, row in enumerate(self._run.plan.table.rows[shard.start : shard.stop])
        }
        rows = table.column("row").to_pylist()
        places = sorted(range(len(rows)), key=lambda i: order[rows[i]])
        return table.take(pa.array(places, pa.int64()))


def _refuse_if_storage_fails(failed: Mapping[Piece, Failure]) -> None:
    """End the run if storage has failed three times: no request is at fault."""
    for piece, failure in failed.items():
        if failure.kind is FailureKind.STORAGE:
            raise StorageError(f"{piece} cannot be finished: {failure}")


def _record(shard: Shard) -> str:
    return f"targets-{shard.name}"


def _note(found: FoundTargets, shard: Shard, record: dict[str, Any]) -> None:
    found.files[shard.index] = record["file"]
    found.failures |= {Row(int(row)): reason for row, reason in record["failures"].items()}
