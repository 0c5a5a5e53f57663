"""The update on partitioned weights: the work of each rank of the group, layer by layer.

Every rank holds its slice of all weights and reads the keys and residuals of its own shards. The
sums are added over ranks; each rank solves for its rows of Δ, which are independent of each other.
Then each rank in turn broadcasts its rows, every rank adds the part that falls into its slice of
the weight, and rank 0 writes them to the file that the run keeps. So no rank ever holds more than
its partition, the sums, and the weight that a forward pass gathers.

Shape letters: E requests, K key width, V value width, R rows of one rank.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import torch
from torch import nn

from pipeline.cluster import tell_gpu_memory
from pipeline.data import read_targets
from pipeline.models import (
    check_loaded,
    model_on_node,
    open_causal_lm,
    open_tokenizer,
)
from pipeline.second_moments import FactorFile, module_name, read_moments
from pipeline.storage import Store
from pipeline.zero import slices
from pipeline.zero.collectives import (
    add_up,
    added,
    all_rows,
    in_lockstep,
    largest,
    reduced_to_rows,
    rows_in_turn,
    share_of_rows,
)
from pipeline.zero.experts import solved_experts
from pipeline.zero.layer_edit import Block, LayerReport, Solved, on_top
from pipeline.zero.loading import Offload, load_partitioned
from pmet.delta import EditWriter, check_fits, delta_rows
from pmet.errors import NotFiniteError
from pmet.hparams import PMETHyperParams
from pmet.model import ContextTemplates, Layout
from pmet.request import EditRequest
from pmet.update import (
    ExpertSums,
    Factor,
    KeyPower,
    KeyResidualRows,
    KeyResidualSums,
    LookupFile,
    LookupTokenizer,
    cheaper_form,
    factor,
    moment_factor,
    normal_matrix,
    reader_kind,
    solve_rows,
    solve_rows_by_requests,
    spread_share,
    update_weight,
    whitened,
)

if TYPE_CHECKING:
    from pipeline.cluster import Rendezvous

REDONE_ELEMENTS = 1 << 22
"""Elements of a saved Δ that are read at a time when a finished layer is applied again."""


@dataclass(frozen=True)
class UpdateShard:
    """Requests whose sums are added up together, and where their targets are.

    Attributes:
        name: the shard's name.
        requests: those that have a target.
        rows: their rows in the input.
        files: the files in the run folder that hold their targets.
    """

    name: str
    requests: Sequence[EditRequest]
    rows: Sequence[int]
    files: Sequence[str]


@dataclass(frozen=True)
class UpdateJob:
    """The job of every rank.

    Attributes:
        model: a folder that all nodes have, a URL or a hub id.
        layout: where the model keeps its parts.
        hparams: the method's hyper-parameters.
        templates: context templates.
        second_moments: path or URL of the second moments.
        run: the run folder.
        device: ``cpu`` or ``cuda``.
        dtype: dtype of the weights.
        stored: dtype of each edited layer's weight in the checkpoint, by layer number.
        offload: where partitioned weights are kept: ``none`` (on the device) or ``cpu``.
        model_digest: the digest that a copy of the model must have; None accepts any.
    """

    model: str
    layout: Layout
    hparams: PMETHyperParams
    templates: ContextTemplates
    second_moments: str
    run: Store
    device: slices.Device
    dtype: torch.dtype
    stored: Mapping[int, torch.dtype]
    offload: Offload
    model_digest: str | None = None


def _opened(folder: str, job: UpdateJob, *, partitioned: bool) -> tuple[nn.Module, Any]:
    """The model, and DeepSpeed's engine around it if it is partitioned."""
    if partitioned:
        return load_partitioned(folder, dtype=job.dtype, offload=job.offload)
    model = open_causal_lm(folder, dtype=job.dtype)
    check_loaded(folder, model)
    return model, None


class _TakenShard(NamedTuple):
    """A rank's record of a shard besides its tokens: where its targets are."""

    name: str
    rows: array[int]
    files: tuple[str, ...]


class UpdateRank:
    """One rank of the update group.

    Args:
        meeting: where the ranks meet; None: this process is the only rank, and holds the whole
            model without DeepSpeed.
        job: the job of every rank.
    """

    def __init__(self, meeting: Rendezvous | None, job: UpdateJob) -> None:
        self._rank, self._ranks = meeting[:2] if meeting else (0, 1)
        self._job, self._device = job, torch.device(job.device)
        if meeting:
            slices.init_rank(*meeting, device=job.device)
        folder = str(model_on_node(job.model, job.model_digest))
        self._tokenizer = open_tokenizer(folder)
        self._model, self._engine = _opened(folder, job, partitioned=meeting is not None)
        # The plan's: partitioned weights are empty, and do not show their shapes.
        self._layout = job.layout
        self._tokenizing = LookupTokenizer(self._tokenizer, job.templates)
        self._batches = LookupFile()
        self._shards: list[_TakenShard] = []
        kind = reader_kind(self._model, self._layout, whole_passes=True)
        self._reader = kind(
            self._model,
            self._layout,
            job.hparams.layers,
            self._tokenizing.shared,
            self._batches,
            self._device,
            whole_passes=True,
        )
        # This rank's slices of the edited weights as they were, for solves after the first.
        self._originals: dict[int, torch.Tensor] = {}

    def take_shards(self, shards: Sequence[UpdateShard]) -> int:
        """Take in the requests of this rank's shards; return the number of requests.

        Only their tokens are kept; the targets are read again in every pass. May be called more
        than once, for lists too long for one message. The shards of one call are read
        together: weights are gathered for every batch, so separate batches for small shards
        would gather them more often.
        """
        requests = [request for shard in shards for request in shard.requests]
        for batch in self._tokenizing.batches(requests):
            self._batches.append(batch)
        self._shards += [
            _TakenShard(shard.name, array("q", shard.rows), tuple(shard.files)) for shard in shards
        ]
        return len(requests)

    def edit_layer(self, index: int, held: LayerReport | None = None) -> LayerReport | None:
        """Update the ``index``-th edited layer; rank 0 saves it and reports.

        Args:
            index: counts the edited layers. They must be edited in order, the first one after the
                last one.
            held: what earlier solves have made of the layer, which its weight holds; the saved
                edit is the sum.

        Raises:
            NumericalError: the solve failed, or the checkpoint's dtype cannot hold the edited
                weight; all ranks raise the same error, and nothing is saved.
        """
        hparams, layout = self._job.hparams, self._layout
        layer = hparams.layers[index]
        second_moment_KK = read_moments(self._job.second_moments, layout, (layer,))[layer]
        if layout.experts:
            solved = self._solved_experts(index, second_moment_KK)
        else:
            solved = self._solved(index, layer, second_moment_KK)
        del second_moment_KK
        name, parameter = layout.weight_name(layer), layout.weight(self._model, layer)
        # No other attempt uses the name: only the file named in the layer's record counts.
        file = f"delta/{name}-{uuid4().hex}.safetensors"
        self._keep_original(layer)
        with ExitStack() as stack:
            if held:
                path = stack.enter_context(self._job.run.local_copy(held.file))
                solved = on_top(solved, path, slices.full_shape(parameter), held)
                slices.put_own_values(self._engine, parameter, self._originals[layer])
            writer = stack.enter_context(self._writer(file, name, parameter))
            for values in rows_in_turn(slices.own_values(self._engine, parameter)):
                if writer:
                    writer.add_original(values)
            squares = self._change(parameter, solved, writer, self._stored(layer))
            norm, before = math.sqrt(squares.delta), math.sqrt(squares.before)
            share = norm / before if before else math.inf
            for dtype in (self._stored(layer), parameter.dtype):
                check_fits(name, squares.largest, share, dtype, layer=layer)
        tell_gpu_memory("update")
        if not writer:
            return None
        return LayerReport(
            parameter=name,
            file=file,
            sha256=self._job.run.sha256(file),
            delta_norm=norm,
            weight_norm=before,
            requests=solved.requests,
            solves=1 + (held.solves if held else 0),
            form=solved.form,
            weight=solved.weight,
            jitter=max([held.jitter if held else 0.0, *solved.jitters]),
            rounding=math.sqrt(squares.lost) / norm if norm else 0.0,
            largest=squares.largest,
            dtype=str(self._stored(layer)).removeprefix("torch."),
        )

    def redo_layer(self, index: int, file: str) -> None:
        """Apply a layer that an earlier group finished and saved."""
        layer = self._job.hparams.layers[index]
        self._keep_original(layer)
        name, parameter = self._layout.weight_name(layer), self._layout.weight(self._model, layer)
        width = slices.full_shape(parameter)[-1]
        start, stop = slices.owned_slice(parameter)
        rows = range(start // width, -(-stop // width))
        with self._job.run.local_copy(file) as path:
            top = rows.start
            for delta in delta_rows(path, name, rows, at_once=max(1, REDONE_ELEMENTS // width)):
                slices.add_block(self._engine, parameter, delta, top)
                top += len(delta)

    def _keep_original(self, layer: int) -> None:
        """Keep this rank's slice of an unedited weight if a later solve will start from it."""
        if self._job.hparams.solves > 1 and layer not in self._originals:
            parameter = self._layout.weight(self._model, layer)
            values = slices.own_values(self._engine, parameter)
            self._originals[layer] = values.detach().to("cpu", copy=True)

    def _stored(self, layer: int) -> torch.dtype:
        """The dtype that the layer's weight is published in."""
        return self._job.stored[layer]

    def _change(
        self,
        parameter: nn.Parameter,
        solved: Solved,
        writer: EditWriter | None,
        stored: torch.dtype,
    ) -> slices.Squares:
        """Add Δ to the weight, block by block; return sums over all elements."""
        sums, most = [0.0, 0.0, 0.0], 0.0
        whole = slices.own_squares(self._engine, parameter) if solved.partial else None
        for block, top, left in solved.blocks:
            *here, here_most = slices.add_block(
                self._engine, parameter, block, top, left, stored=stored
            )
            sums = [total + more for total, more in zip(sums, here, strict=True)]
            # max() ignores NaN.
            most = here_most if math.isnan(here_most) else max(most, here_most)
            if writer:
                writer.put_delta(block, top, left)
        if whole is not None:
            sums[1], largest_before = whole
            most = most if math.isnan(most) else max(most, largest_before)
        delta, before, lost = map(added, sums)
        return slices.Squares(delta, before, lost, largest(most))

    def _row_blocks(self, own_RK: torch.Tensor) -> Iterator[Block]:
        """Δ of which each rank has some rows, in the weight's orientation."""
        first = 0
        for delta_RK in rows_in_turn(own_RK):
            top, left = (0, first) if self._layout.transposed else (first, 0)
            yield Block(self._layout.orient(delta_RK), top, left)
            first += len(delta_RK)

    @contextmanager
    def _writer(self, file: str, name: str, parameter: nn.Parameter) -> Iterator[EditWriter | None]:
        """Open rank 0's file for a layer's edit; the run folder has it once the block ends well."""
        if self._rank:
            yield None
            return
        with self._job.run.local_target(file) as path:
            shape = slices.full_shape(parameter)
            with EditWriter(path, name, shape, parameter.dtype) as writer:
                yield writer

    def _solved(self, index: int, layer: int, second_moment_KK: torch.Tensor) -> Solved:
        """Δ, in the form that needs fewer operations."""
        layout = self._layout
        widths = (layout.key_width, layout.value_width)
        count = int(added(sum(self._batches.counts)))
        if cheaper_form(count, *widths, factored=True) == "keys":
            return self._solved_by_keys(index, second_moment_KK, count)
        module = module_name(layout, layer)
        kept = FactorFile(self._job.second_moments, module, second_moment_KK)
        # One rank looks for the factor, so that all make the same choice.
        factored = bool(added(self._rank == 0 and kept.exists()))
        if cheaper_form(count, *widths, factored=factored) == "keys":
            return self._solved_by_keys(index, second_moment_KK, count)
        moment = kept.read() if factored else moment_factor(second_moment_KK.to(self._device))
        if self._rank == 0 and not factored:
            kept.keep(moment)
        return self._solved_by_requests(index, moment, second_moment_KK, count)

    def _solved_by_keys(self, index: int, second_moment_KK: torch.Tensor, count: int) -> Solved:
        layout, hparams = self._layout, self._job.hparams
        sums = KeyResidualSums.zeros(layout.key_width, layout.value_width, self._device)
        self._collect(index, sums)
        weight = self._weight(sums.power, second_moment_KK)
        gram_KK, cross_RK = sums.gram_KK, reduced_to_rows(sums.cross_VK)
        del sums
        add_up(gram_KK)
        found = factor(normal_matrix(gram_KK, second_moment_KK, weight))
        del gram_KK
        cross_RK *= spread_share(index, len(hparams.layers), hparams.spread)
        blocks = self._row_blocks(solve_rows(found.lower, cross_RK))
        return Solved(blocks, count, "keys", weight, [found.jitter])

    def _weight(self, power: KeyPower, moment: torch.Tensor) -> float:
        """λ of a layer, from this rank's keys and the others'."""
        everywhere = KeyPower(added(power.total), int(added(power.keys)))
        return update_weight(self._job.hparams, everywhere, moment)

    def _solved_by_requests(
        self, index: int, moment: Factor, second_moment_KK: torch.Tensor, count: int
    ) -> Solved:
        layout, hparams = self._layout, self._job.hparams
        rows = KeyResidualRows.room(
            sum(self._batches.counts), layout.key_width, layout.value_width, self._device
        )
        self._collect(index, rows)
        weight = self._weight(rows.power, second_moment_KK)
        lower_KK = moment.lower.to(self._device)
        # Each rank whitens its own keys; the E×E matrix needs all of them.
        whitened_EK = all_rows(whitened(rows.keys_EK, lower_KK))
        own = share_of_rows(layout.value_width, self._rank, self._ranks)
        share = spread_share(index, len(hparams.layers), hparams.spread)
        residuals_ER = share * all_rows(rows.residuals_EV)[:, own]
        delta_RK, jitter = solve_rows_by_requests(whitened_EK, residuals_ER, lower_KK, weight)
        jitters = [jitter, moment.jitter]
        return Solved(self._row_blocks(delta_RK), count, "requests", weight, jitters)

    def _solved_experts(self, index: int, second_moments_XKK: torch.Tensor) -> Solved:
        """Δ of each expert that a request is routed to."""
        layout, hparams = self._layout, self._job.hparams
        sums = ExpertSums((layout.key_width, layout.value_width), self._device)
        self._collect(index, sums)
        weight = self._weight(sums.power, second_moments_XKK)
        jitters: list[float] = []

        def blocks() -> Iterator[Block]:
            for solved in solved_experts(
                sums,
                second_moments_XKK,
                weight,
                spread_share(index, len(hparams.layers), hparams.spread),
                rank=self._rank,
                ranks=self._ranks,
            ):
                block = layout.orient(solved.delta_VK)
                yield Block(block, solved.expert * len(block), 0)
                jitters.append(solved.jitter)

        return Solved(blocks(), int(added(sums.count)), "keys", weight, jitters, partial=True)

    def _collect(self, index: int, into: KeyResidualSums | KeyResidualRows | ExpertSums) -> None:
        """Read keys and residuals of this rank's requests, together with the other ranks."""
        reader, targets = self._reader, self._targets_by_batch()
        with reader.reading(index):
            # Ranks gather weights together: if one skipped a forward pass, the others would
            # hang, so a rank with no batch left runs a filler.
            for number, counts in in_lockstep(range(len(self._batches)), -1):
                if not counts:
                    reader.run_along()
                    continue
                keys, values_EV = reader.read(number)
                residuals_EV = next(targets).to(self._device) - values_EV
                # The reader gives what the layout's kind of sums takes.
                into.add(keys, residuals_EV)  # type: ignore[arg-type]

    def _targets_by_batch(self) -> Iterator[torch.Tensor]:
        """The targets (E, V) of each batch in turn, float64, one shard in memory at a time."""
        shards = iter(self._shards)
        targets_EV = torch.zeros(0, self._layout.value_width, dtype=torch.float64)
        for count in self._batches.counts:
            while len(targets_EV) < count:
                targets_EV = torch.cat([targets_EV, self._targets(next(shards))])
            yield targets_EV[:count]
            targets_EV = targets_EV[count:]

    def _targets(self, shard: _TakenShard) -> torch.Tensor:
        by_row: dict[int, torch.Tensor] = {}
        for file in shard.files:
            arrays = read_targets(self._job.run.read_table(file))
            by_row |= dict(zip(arrays.rows.tolist(), torch.tensor(arrays.values), strict=True))
        values_EV = torch.stack([by_row[row] for row in shard.rows]).double()
        if not torch.isfinite(values_EV).all():
            raise NotFiniteError(f"targets of shard {shard.name} hold NaN or infinity")
        return values_EV
