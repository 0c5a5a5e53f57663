"""Targets of earlier runs, kept for later ones.

A target depends on the model, the hyper-parameters, the context templates, the dtype, and the
request itself with those that share its target, and is stored under the digest of all of these.
Everything except the requests is the *context*, whose targets are kept in segments
(`pipeline.storage.segments`); targets found together form one segment. A lookup first reads the key
columns, then only the rows it needs.

Shape letters: E requests, D model width.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch

from pipeline.data import FIRST_LOSS, TargetArrays, targets_table
from pipeline.plan import Plan
from pipeline.storage import Segments, Store, digest_of
from pmet.request import EditRequest
from pmet.separator import SPACE

FORMAT = 1
_KEY, _FILE = "key", "__filename"
# Used only by the update; no target depends on them.
_UPDATE_ONLY = {
    "layers",
    "solves",
    "spread",
    "mom2_update_weight",
    "mom2_update_share",
    "mom2_adjustment",
    "mom2_dataset",
    "mom2_n_samples",
    "mom2_dtype",
}


class StoredTargets:
    """The targets that a lookup found; their values are in a temporary file.

    Args:
        keys: the keys found, in the order of the arrays.
        values: (E, D) float32.
        steps: (E,) int32, number of evaluations of the loss.
        losses: (E,) float32, the last loss.
        first_losses: (E,) float32, the loss before the first step; NaN where unknown.
    """

    def __init__(
        self,
        keys: Sequence[str],
        values: np.ndarray,
        steps: np.ndarray,
        losses: np.ndarray,
        first_losses: np.ndarray,
    ) -> None:
        self._places = {key: place for place, key in enumerate(keys)}
        self._values, self._steps, self._losses = values, steps, losses
        self._first_losses = first_losses

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @classmethod
    def none(cls, width: int) -> StoredTargets:
        """The result of a lookup that finds nothing."""
        none = np.empty(0, np.float32)
        return cls([], np.empty((0, width), np.float32), np.empty(0, np.int32), none, none)

    def arrays(self, keys: Sequence[str], rows: Sequence[int]) -> TargetArrays:
        """The targets of some of the found keys, for the given input rows."""
        places = [self._places[key] for key in keys]
        return TargetArrays(
            rows=np.array(rows, np.int64),
            values=np.array(self._values[places]),
            steps=self._steps[places],
            losses=self._losses[places],
            first_losses=self._first_losses[places],
        )


@dataclass(frozen=True)
class TargetStore:
    """The store for the requests of one context.

    Attributes:
        store: the store's folder.
        context: what all targets of a run depend on, as JSON.
        width: D.
    """

    store: Store
    context: dict[str, Any]
    width: int

    @classmethod
    def of(cls, plan: Plan, templates: Sequence[Sequence[str]]) -> TargetStore | None:
        """The store that a job names, or None."""
        url = plan.job.targets.store
        if url is None:
            return None
        context = {
            "format": FORMAT,
            # Configuration, weights and tokenizer.
            "model": plan.digests["model"],
            "hparams": plan.hparams.model_dump(mode="json", exclude=_UPDATE_ONLY),
            "layer": plan.hparams.target_layer,
            "context_templates": [text for group in templates for text in group],
            "dtype": _dtype(plan),
        }
        return cls(Store(url), context, plan.layout.value_width)

    @cached_property
    def segments(self) -> Segments:
        """The segments of the context."""
        return Segments(self.store, "targets.store", self.context)

    @property
    def digest(self) -> str:
        """SHA-256 of the context, the name of its folder."""
        return self.segments.digest

    def key(self, request: EditRequest, group: Sequence[EditRequest] = ()) -> str:
        """SHA-256 of everything that a request's target depends on.

        Args:
            request: the request.
            group: the requests that share one target, including ``request``; otherwise empty.
        """
        return digest_of([self.digest, *_asked(request), *sorted(map(_asked, group))])

    def keys(self, requests: Sequence[EditRequest], groups: Sequence[int]) -> list[str]:
        """The keys of requests that are computed together; one group shares one target."""
        by_group: dict[int, list[EditRequest]] = defaultdict(list)
        for request, group in zip(requests, groups, strict=True):
            by_group[group].append(request)
        alone = {group for group, some in by_group.items() if len(some) == 1}
        return [
            self.key(request, () if group in alone else by_group[group])
            for request, group in zip(requests, groups, strict=True)
        ]

    def write(
        self,
        requests: Sequence[EditRequest],
        arrays: TargetArrays,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Store targets (E, D) of requests that were computed together, in ``groups`` if any.

        Targets that are not finite are left out.

        Raises:
            StorageError: the store cannot be written.
        """
        finite = np.isfinite(arrays.values).all(axis=1).nonzero()[0]
        if not len(finite):
            return
        first = arrays.first_losses
        table = targets_table(
            finite,
            arrays.values[finite],
            arrays.steps[finite],
            arrays.losses[finite],
            None if first is None else first[finite],
        )
        all_keys = self.keys(requests, groups or range(len(requests)))
        keys = pa.array([all_keys[place] for place in finite], pa.string())
        table = table.set_column(0, _KEY, keys)
        self.segments.write(table)

    @contextmanager
    def lookup(self, keys: Collection[str]) -> Iterator[StoredTargets]:
        """Find the targets of some keys; they can be read during the ``with`` block.

        If several segments have a target, the first by name is used. Targets that are not finite
        are ignored, no matter which run wrote them.

        Raises:
            StorageError: the store cannot be read, or a segment of it is damaged.
        """
        names = self.segments.names()
        with tempfile.TemporaryFile() as file:
            with self.segments.reading(names):
                chosen = self._chosen(names, set(keys))
                found = self._read(chosen, file) if chosen else StoredTargets.none(self.width)
            yield found

    def _chosen(self, names: Sequence[str], wanted: set[str]) -> dict[str, str]:
        """The segment to read each key from, for the keys that exist."""
        chosen: dict[str, str] = {}
        if names:
            table = self.store.dataset(names).to_table(columns=[_KEY, _FILE])
            table = table.sort_by(_FILE)
            for key, file in zip(*(table[n].to_pylist() for n in (_KEY, _FILE)), strict=True):
                if key in wanted:
                    chosen.setdefault(key, file)
        return chosen

    def _read(self, chosen: Mapping[str, str], file: IO[bytes]) -> StoredTargets:
        """Read the chosen targets, one batch of a segment at a time."""
        count = len(chosen)
        # Not in memory: the targets of a large job take gigabytes.
        values = np.memmap(file, np.float32, mode="w+", shape=(count, self.width))
        steps = np.empty(count, np.int32)
        losses, first_losses = np.empty(count, np.float32), np.empty(count, np.float32)
        keys: list[str] = []
        names = sorted({f"{self.digest}/{PurePosixPath(path).name}" for path in chosen.values()})
        columns = [_KEY, "target", "steps", "loss", FIRST_LOSS, _FILE]
        for batch in _with_first_losses(self.store.dataset(names)).to_batches(columns=columns):
            pairs = list(zip(*(batch[name].to_pylist() for name in (_KEY, _FILE)), strict=True))
            flat = batch["target"].flatten().to_numpy(zero_copy_only=False)
            all_values = flat.reshape(len(pairs), self.width)
            finite = np.isfinite(all_values).all(axis=1)
            own = [i for i, (key, path) in enumerate(pairs) if chosen.get(key) == path]
            own = [i for i in own if finite[i]]
            here = slice(len(keys), len(keys) + len(own))
            values[here] = all_values[own]
            steps[here] = batch["steps"].to_numpy()[own]
            losses[here] = batch["loss"].to_numpy()[own]
            first_losses[here] = batch[FIRST_LOSS].to_numpy(zero_copy_only=False)[own]
            keys += [pairs[i][0] for i in own]
        return StoredTargets(keys, values, steps, losses, first_losses)


def _with_first_losses(segments: ds.Dataset) -> ds.Dataset:
    """Add the column that segments of older releases lack; it is null in them."""
    schema = segments.schema
    if FIRST_LOSS in schema.names:
        return segments
    return segments.replace_schema(schema.append(pa.field(FIRST_LOSS, pa.float32())))


def _dtype(plan: Plan) -> str:
    """The dtype of weights and activations while targets are computed."""
    source = plan.target_source
    if source.dtype != "auto":
        return source.dtype
    stored = plan.stored[plan.hparams.target_layer].dtype
    return str(stored if source.on_gpu else torch.float32).removeprefix("torch.")


def _asked(request: EditRequest) -> list[str]:
    asked = [request.prompt, request.subject, request.target_new]
    between = request.between(request.text, request.target_new)
    # Targets of older releases, which always put a space here, keep their keys.
    return asked if between == _formerly(request.text) else [*asked, between]


def _formerly(text: str) -> str:
    return "" if text[-1:].isspace() else SPACE
