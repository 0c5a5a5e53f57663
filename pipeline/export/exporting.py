"""Exporting a run's edit: its deltas, or a LoRA adapter, into a folder of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.edits import (
    EXPORT,
    SavedEdit,
    check_claim,
    claim,
    opened_edit,
    refuse_used,
    release,
)
from pipeline.evaluation import is_number
from pipeline.events import EventKind, StageName
from pipeline.export.adapter import (
    ADAPTER_CONFIG,
    WEIGHTS,
    adapter_bytes,
    adapter_config,
    rank_of,
    write_weights,
)
from pipeline.export.card import adapter_card, delta_card
from pipeline.export.factors import EXACT, FactoredWeight, Target, factor, targets_of
from pipeline.export.scores import Scores, measure_again
from pipeline.models import open_skeleton
from pipeline.progress import Progress, Stage
from pipeline.report import base_model
from pipeline.run_folder import CARD, MODEL, RunRecord, read_finished, versions
from pipeline.storage import (
    CHUNK_BYTES,
    Store,
    file_digest,
    json_bytes,
    locate,
    now_text,
    refuse_overlap,
)
from pmet.errors import InputError

Kind = Literal["delta", "adapter"]


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        store: its folder.
        record: the contents of its ``export.json``.
    """

    store: Store
    record: dict[str, Any]


def export_run(
    source: str,
    output: str,
    *,
    kind: Kind,
    rank: int | None = None,
    energy: float | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Write a run's edit alone, with a card.

    Args:
        source: path or URL of the folder of a finished run.
        output: path or URL of a folder that is empty or does not exist.
        kind: ``delta``: the changes of the weights, which `apply_edit` takes; ``adapter``: a LoRA
            adapter, which PEFT opens.
        rank: largest rank of an adapter's factors; None: that of Δ.
        energy: share of each Δ's squared singular values that an adapter keeps; None: all.
        measure: measure an adapter again that is not exact.
        progress: shows what is computed and written; None shows nothing.

    Raises:
        InputError: an argument or the run cannot be used; nothing has been written.
        StorageError: a file cannot be read or written.
    """
    _check_options(kind, rank, energy, measure)
    refuse_overlap(("--output", output), [("run", locate(source))])
    store, progress = Store(output), progress or Progress()
    refuse_used(store)
    run = read_finished(Store(source))
    with ExitStack() as stack:
        edit = stack.enter_context(opened_edit(source))
        if edit.warning:
            progress.event(EventKind.WARNING, edit.warning)
        if kind == "delta":
            record = _write_deltas(store, run, edit, progress)
        else:
            targets = _targets(run, edit)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            weights = factor(edit, targets, folder, rank=rank, energy=energy, progress=progress)
            _note_size(weights, progress)
            exact = max(weight.error for weight in weights) <= EXACT
            scores = None if exact or not measure else measure_again(run, weights, progress)
            record = _write_adapter(store, run, edit, weights, exact, scores, progress)
    return Exported(store, record)


def _check_options(kind: Kind, rank: int | None, energy: float | None, measure: bool) -> None:
    if kind == "delta" and (rank is not None or energy is not None or not measure):
        raise InputError(
            "--rank, --energy and --no-measure are for --format adapter; a delta is always whole"
        )
    if rank is not None and energy is not None:
        raise InputError("--rank and --energy both set the rank of the adapter; give one of them")
    if rank is not None and rank < 1:
        raise InputError(f"--rank is {rank}; give a rank of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"--energy is {energy:g}; give a share above 0, at most 1, such as 0.99")


def _targets(run: RunRecord, edit: SavedEdit) -> dict[str, Target]:
    with run.store.local_copy(f"{MODEL}/config.json") as config:
        return targets_of(open_skeleton(config.parent), edit)


def _note_size(weights: Sequence[FactoredWeight], progress: Progress) -> None:
    numbers = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    ours = rank_of(weights) * sum(map(sum, (weight.shape for weight in weights)))
    if ours > numbers:
        progress.event(
            EventKind.NOTE,
            f"factors of rank {rank_of(weights)} hold {ours / numbers:.2g} times as many numbers "
            "as the weights that they change; a smaller --rank or --energy, --format delta or the "
            "run's model may serve better",
        )


def _write_deltas(
    store: Store, run: RunRecord, edit: SavedEdit, progress: Progress
) -> dict[str, Any]:
    files = {f"{name}.safetensors": weight.file for name, weight in edit.weights.items()}
    record = _record("delta", run, edit) | {
        "weights": [{"parameter": name} for name in edit.weights],
        "files": [
            {"name": name, "sha256": file_digest(file), "bytes": file.stat().st_size}
            for name, file in files.items()
        ],
    }
    sizes = {name: file.stat().st_size for name, file in files.items()}
    with _writing(store, sizes, EXPORT, progress) as (written, bar):
        written(CARD, delta_card(record).encode())
        for name, file in files.items():
            with file.open("rb") as source, store.write_stream(name) as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
            bar.advance(sizes[name] >> 20)
        written(EXPORT, json_bytes(record))
    return record


def _write_adapter(
    store: Store,
    run: RunRecord,
    edit: SavedEdit,
    weights: Sequence[FactoredWeight],
    exact: bool,
    scores: Scores | None,
    progress: Progress,
) -> dict[str, Any]:
    record = _record("adapter", run, edit) | {
        "weights": [weight.as_json() for weight in weights],
        "rank": rank_of(weights),
        "exact": exact,
        "measured_on": scores.device if scores else None,
    }
    figures = scores.figures if scores else None
    record["scores"]["adapter"] = figures
    record["intervals"]["adapter"] = scores.intervals if scores else None
    record["change"] = _changes(figures, record["scores"]["run"]) if figures else None
    sizes = {WEIGHTS: adapter_bytes(weights)}
    with _writing(store, sizes, ADAPTER_CONFIG, progress) as (written, bar):
        written(CARD, adapter_card(record).encode())
        for weight in write_weights(store, weights):
            bar.advance(adapter_bytes([weight]) >> 20)
        record["files"] = [
            {"name": WEIGHTS, "sha256": store.sha256(WEIGHTS), "bytes": store.size(WEIGHTS)}
        ]
        written(EXPORT, json_bytes(record))
        written(ADAPTER_CONFIG, json_bytes(adapter_config(record["base"]["model"], weights)))
    return record


@contextmanager
def _writing(
    store: Store, sizes: Mapping[str, int], last: str, progress: Progress
) -> Iterator[tuple[Callable[[str, bytes], None], Stage]]:
    """Take a folder to write to; yields a function that writes a small file, and a bar in MB."""
    total = sum(size >> 20 for size in sizes.values())
    with progress.stage(StageName.PUBLISH, total) as bar:
        token = claim(store, {*sizes, CARD, EXPORT, last}, last)

        def write(name: str, data: bytes) -> None:
            check_claim(store, token)
            store.write_bytes(name, data)

        yield write, bar
        release(store)


def _record(kind: Kind, run: RunRecord, edit: SavedEdit) -> dict[str, Any]:
    """What ``export.json`` says of any export."""
    intervals = run.metrics.get("intervals") or {}
    return {
        "format": kind,
        "run": run.store.url,
        "digest": run.run.get("digest"),
        "status": run.run["status"],
        "base": {"model": base_model(run.job), "digest": edit.base},
        "method": "PMET",
        "facts": run.counts.get("edited") or 0,
        "scores": {"before": run.before, "run": run.after},
        "intervals": {"before": intervals.get("before") or {}, "run": intervals.get("after") or {}},
        "versions": versions(),
        "exported_at": now_text(),
    }


def _changes(ours: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, float]:
    """How far each figure of the adapter is from the run's."""
    return {
        name: value - run[name]
        for name, value in ours.items()
        if is_number(value) and is_number(run.get(name))
    }
