"""The update on partitioned weights: what each rank of the group does, layer by layer.

Every rank holds its slice of all weights and reads the keys and residuals of its own shards. The
sums are added over ranks; each rank solves for its rows of Δ, which do not depend on each other;
the rows are put together, one layer at a time, and each rank adds its own slice to its own part of
the weight. So no rank ever holds more than its partition, the sums, and one edited weight.

Shape letters: E requests, K key width, V value width, R rows of one rank.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist

from pipeline import partition
from pipeline.factors import FactorFile
from pipeline.moments import module_name, read_moments
from pipeline.rank_group import Rendezvous
from pipeline.replica import open_tokenizer
from pipeline.schema import read_targets
from pipeline.store import Store
from pmet.architecture import resolve
from pmet.contexts import ContextTemplates
from pmet.delta import Edit, changed
from pmet.errors import NotFiniteError
from pmet.hparams import PMETHyperParams
from pmet.key_reader import KeyReader
from pmet.keys import Lookups, LookupTokenizer
from pmet.request import EditRequest
from pmet.solve import (
    Factor,
    Form,
    cheaper_form,
    factor,
    moment_factor,
    normal_matrix,
    solve_rows,
    solve_rows_by_requests,
    whitened,
)
from pmet.spread import square_root_spread
from pmet.sums import KeyResidualRows, KeyResidualSums


@dataclass(frozen=True)
class UpdateShard:
    """Requests whose sums are added up together, and their targets' rows.

    Attributes:
        name: of the shard.
        requests: those that have a target.
        rows: their rows in the input.
        files: target files that hold the targets, in the run folder.
    """

    name: str
    requests: Sequence[EditRequest]
    rows: Sequence[int]
    files: Sequence[str]


@dataclass(frozen=True)
class UpdateJob:
    """What every rank is told.

    Attributes:
        model: local model folder.
        hparams: the method's hyper-parameters.
        templates: context templates.
        second_moments: where they are.
        run: the run folder.
        device: ``cpu`` or ``cuda``.
        dtype: of the weights.
        offload: where partitioned weights wait: ``none`` (on the device) or ``cpu``.
    """

    model: str
    hparams: PMETHyperParams
    templates: ContextTemplates
    second_moments: str
    run: Store
    device: partition.Device
    dtype: torch.dtype
    offload: partition.Offload


@dataclass(frozen=True)
class LayerReport:
    """What the update did to one weight.

    Attributes:
        parameter: its name.
        file: saved edit of this layer, in the run folder.
        sha256: of that file.
        delta_norm: Frobenius norm of Δ.
        weight_norm: Frobenius norm of the weight before.
        requests: how many it holds.
        form: of the solve: ``keys`` or ``requests`` (see `pmet.solve`).
        jitter: share of its mean diagonal element that the factored matrix took; 0 as a rule.
        rounding: ‖what the weight's dtype rounds off‖ / ‖Δ‖.
    """

    parameter: str
    file: str
    sha256: str
    delta_norm: float
    weight_norm: float
    requests: int
    form: Form
    jitter: float
    rounding: float


class _Solved(NamedTuple):
    """This rank's rows of Δ, and how they were found."""

    delta_RK: torch.Tensor
    requests: int
    form: Form
    jitter: float


class _TakenShard(NamedTuple):
    """What a rank keeps of a shard beside its batches: where its targets are."""

    name: str
    rows: array[int]
    files: tuple[str, ...]
    batches: int


class UpdateRank:
    """One rank of the update group."""

    def __init__(self, meeting: Rendezvous, job: UpdateJob) -> None:
        self._rank, self._ranks, self._job = meeting.rank, meeting.world_size, job
        self._device = torch.device(job.device)
        partition.init_rank(*meeting, device=job.device)
        self._tokenizer = open_tokenizer(job.model)
        self._model, self._engine = partition.load_partitioned(
            job.model, dtype=job.dtype, offload=job.offload
        )
        self._layout = resolve(self._model, job.hparams)
        self._tokenizing = LookupTokenizer(self._tokenizer, job.templates)
        self._batches: list[Lookups] = []
        self._shards: list[_TakenShard] = []
        self._reader = KeyReader(
            self._model,
            self._layout,
            job.hparams.layers,
            self._tokenizing.shared,
            self._batches,
            self._device,
            whole_passes=True,
        )

    def take_shards(self, shards: Sequence[UpdateShard]) -> int:
        """Take in the requests of this rank's shards; returns how many they hold.

        Only their tokens are kept; the targets are read again in every pass. May be called more
        than once, for lists too long to be sent in one piece.
        """
        for shard in shards:
            batches = list(self._tokenizing.batches(shard.requests))
            self._batches += batches
            rows = array("q", shard.rows)
            self._shards.append(_TakenShard(shard.name, rows, tuple(shard.files), len(batches)))
        return sum(len(shard.requests) for shard in shards)

    def edit_layer(self, index: int) -> LayerReport | None:
        """Update the ``index``-th edited layer; rank 0 saves it and reports.

        Raises:
            NumericalError: the solve failed; all ranks raise it alike.
        """
        hparams, layout = self._job.hparams, self._layout
        layer = hparams.layers[index]
        second_moment_KK = read_moments(self._job.second_moments, layout, (layer,))[layer]
        solved = self._solved(index, layer, second_moment_KK)
        del second_moment_KK
        delta = layout.orient(partition.all_rows(solved.delta_RK))
        parameter = layout.weight(self._model, layer)
        with partition.gathered(parameter) as weight:
            original = weight.detach().cpu().clone() if self._rank == 0 else None
        partition.add_to_slice(self._engine, parameter, delta)
        if original is None:
            return None
        return self._save(layout.weight_name(layer), delta.cpu(), original, solved)

    def redo_layer(self, index: int, file: str) -> None:
        """Apply a layer that an earlier group has finished and saved."""
        layer = self._job.hparams.layers[index]
        name = self._layout.weight_name(layer)
        with self._job.run.local_copy(file) as path:
            delta = Edit.load(path).deltas[name]
        parameter = self._layout.weight(self._model, layer)
        partition.add_to_slice(self._engine, parameter, delta.to(self._device))

    def _solved(self, index: int, layer: int, second_moment_KK: torch.Tensor) -> _Solved:
        """This rank's rows of Δ, in the form that takes fewer operations."""
        layout = self._layout
        widths = (layout.key_width, layout.value_width)
        count = self._added(sum(batch.count for batch in self._batches))
        if cheaper_form(count, *widths, factored=True) == "keys":
            return self._solved_by_keys(index, second_moment_KK, count)
        module = module_name(layout, layer)
        kept = FactorFile(self._job.second_moments, module, second_moment_KK)
        # One rank looks for the factor, so that all choose alike.
        factored = bool(self._added(int(self._rank == 0 and kept.exists())))
        if cheaper_form(count, *widths, factored=factored) == "keys":
            return self._solved_by_keys(index, second_moment_KK, count)
        moment = kept.read() if factored else moment_factor(second_moment_KK.to(self._device))
        if self._rank == 0 and not factored:
            kept.keep(moment)
        return self._solved_by_requests(index, moment, count)

    def _solved_by_keys(self, index: int, second_moment_KK: torch.Tensor, count: int) -> _Solved:
        layout, hparams = self._layout, self._job.hparams
        sums = KeyResidualSums.zeros(layout.key_width, layout.value_width, self._device)
        self._collect(index, sums)
        dist.all_reduce(sums.gram_KK)
        dist.all_reduce(sums.cross_VK)
        matrix_KK = normal_matrix(sums.gram_KK, second_moment_KK, hparams.mom2_update_weight)
        found = factor(matrix_KK)
        share = square_root_spread(index, len(hparams.layers))
        own = self._own_rows(layout.value_width)
        return _Solved(
            solve_rows(found.lower, share * sums.cross_VK[own]), count, "keys", found.jitter
        )

    def _solved_by_requests(self, index: int, moment: Factor, count: int) -> _Solved:
        layout, hparams = self._layout, self._job.hparams
        rows = KeyResidualRows.room(
            sum(b.count for b in self._batches), layout.key_width, layout.value_width, self._device
        )
        self._collect(index, rows)
        lower_KK = moment.lower.to(self._device)
        # Each rank whitens its own keys; the E×E matrix wants all of them.
        whitened_EK = partition.all_rows(whitened(rows.keys_EK, lower_KK))
        own = self._own_rows(layout.value_width)
        share = square_root_spread(index, len(hparams.layers))
        residuals_ER = share * partition.all_rows(rows.residuals_EV)[:, own]
        delta_RK, jitter = solve_rows_by_requests(
            whitened_EK, residuals_ER, lower_KK, hparams.mom2_update_weight
        )
        return _Solved(delta_RK, count, "requests", max(jitter, moment.jitter))

    def _collect(self, index: int, into: KeyResidualSums | KeyResidualRows) -> None:
        """Read keys and residuals of this rank's requests, with the other ranks."""
        reader, targets = self._reader, self._targets_by_batch()
        reader.begin(index)
        # Ranks gather weights together: a forward pass that one of them left out would hang the
        # others, so one that has no batch left runs along.
        for number, counts in partition.in_lockstep(range(len(self._batches)), -1):
            if not counts:
                reader.run_along()
                continue
            keys_EK, values_EV = reader.read(number)
            into.add(keys_EK, next(targets).to(self._device) - values_EV)

    def _added(self, number: int) -> int:
        """The sum of a number over all ranks."""
        total = torch.tensor(number, dtype=torch.int64, device=self._device)
        dist.all_reduce(total)
        return int(total.item())

    def _targets_by_batch(self) -> Iterator[torch.Tensor]:
        """The targets (E, V) of each batch in turn, float64, a shard's in memory at a time."""
        batches = iter(self._batches)
        for shard in self._shards:
            targets_EV = self._targets(shard)
            start = 0
            for batch in islice(batches, shard.batches):
                yield targets_EV[start : start + batch.count]
                start += batch.count

    def _own_rows(self, count: int) -> slice:
        each = -(-count // self._ranks)
        return slice(min(count, self._rank * each), min(count, (self._rank + 1) * each))

    def _save(
        self, name: str, delta: torch.Tensor, original: torch.Tensor, solved: _Solved
    ) -> LayerReport:
        # No other attempt uses the name: what counts is what the layer's record names.
        file = f"delta/{name}-{uuid4().hex}.safetensors"
        with self._job.run.local_target(file) as path:
            Edit({name: delta}, {name: original}).save(path)
        lost = changed(original, delta).double().sub_(original).sub_(delta)
        norm = delta.norm().item()
        return LayerReport(
            parameter=name,
            file=file,
            sha256=self._job.run.sha256(file),
            delta_norm=norm,
            weight_norm=original.double().norm().item(),
            requests=solved.requests,
            form=solved.form,
            jitter=solved.jitter,
            rounding=lost.norm().item() / norm if norm else 0.0,
        )

    def _targets(self, shard: _TakenShard) -> torch.Tensor:
        by_row: dict[int, torch.Tensor] = {}
        for file in shard.files:
            arrays = read_targets(self._job.run.read_table(file))
            by_row |= dict(zip(arrays.rows.tolist(), torch.from_numpy(arrays.values), strict=True))
        values_EV = torch.stack([by_row[row] for row in shard.rows]).double()
        if not torch.isfinite(values_EV).all():
            raise NotFiniteError(f"targets of shard {shard.name} hold NaN or infinity")
        return values_EV
