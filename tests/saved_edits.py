"""Edits, models and folders for the tests of `pmet apply`, `revert`, `export` and `push`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.edits.rewriting import apply_edit
from pipeline.models.checkpoint import Checkpoint
from pipeline.report.card import model_card
from pipeline.storage.store import Store
from pmet import Edit
from tests.conftest import GOLDEN
from tests.pipeline.report.test_comparison import run_in, with_wrong

DIGEST = "0123456789abcdef" * 4
"""The digest of the run of `published_run`."""
WEIGHTS = {
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "llama": "model.layers.{}.mlp.down_proj.weight",
}


def base(family: str) -> Path:
    """The golden model of a family."""
    return GOLDEN / family / "model"


def names_of(family: str, layers: tuple[int, ...] = (0, 1)) -> list[str]:
    """The weights that edits of a family change."""
    return [WEIGHTS[family].format(layer) for layer in layers]


def copy_as(
    source: Path, target: Path, dtype: torch.dtype = torch.float32, *, shards: bool = False
) -> Path:
    """Copy a model in a dtype, in one file or in two with an index."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = {n: t.to(dtype).contiguous() for n, t in load_file(file).items()}
    if not shards:
        save_file(tensors, str(file), metadata={"format": "pt"})
        return target
    file.unlink()
    held = {f"model-{i + 1:05d}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for name, some in held.items():
        save_file({n: tensors[n] for n in some}, str(target / name), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, some in held.items() for n in some}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder, by their names in its files."""
    checkpoint = Checkpoint.open(model)
    return {name: checkpoint.read(stored) for name, stored in checkpoint.tensors.items()}


def save_edit(
    model: Path,
    names: list[str],
    file: Path,
    *,
    seed: int = 0,
    size: float = 0.05,
    rank: int | None = None,
) -> Path:
    """Save a random edit of a model's weights: ``size`` is that of an element of Δ."""
    weights = weights_of(model)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def delta(rows: int, columns: int) -> torch.Tensor:
        if rank is None:
            return size * random(rows, columns)
        return size / rank**0.5 * random(rows, rank) @ random(rank, columns)

    deltas = {name: delta(*weights[name].shape) for name in names}
    file.parent.mkdir(parents=True, exist_ok=True)
    Edit(deltas, {name: weights[name] for name in names}).save(file)
    return file


def edited_run(
    folder: Path, model: Path, names: list[str], *, rank: int | None = 6, status: str = "complete"
) -> Path:
    """The folder of a finished run with a random edit, as far as an export reads it."""
    layers = []
    for number, name in enumerate(names):
        file = save_edit(model, [name], folder / "delta" / f"{number}.safetensors", rank=rank)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        layers.append({"parameter": name, "file": f"delta/{file.name}", "sha256": digest})
    apply_edit(str(folder / "delta"), str(model), str(folder / "model"))
    run = {
        "status": status,
        "layers": layers,
        "digests": {"model": Checkpoint.open(model).digest()},
        "versions": {"pmet-pipeline": "1"},
    }
    run_in(Store(folder), with_wrong(30, {4}), run=run)
    (folder / "job.yaml").write_text(f"model: {model}\n")
    return folder


def published_run(folder: Path, *, status: str = "complete", model: str | None = None) -> Path:
    """The folder of a finished run of a golden model, as far as a push reads it.

    Args:
        folder: where it is written.
        status: how the run ended.
        model: what its job names as the base model; None: where that is.
    """
    edited_run(folder, base("gpt2"), names_of("gpt2"), status=status)
    if model is not None:
        (folder / "job.yaml").write_text(f"model: {model}\n")
    store = Store(folder)
    run = store.read_json("run.json") | {"digest": DIGEST, "seed": 0}
    store.write_json("run.json", run)
    names = [name for name in store.list("model") if not name.startswith("model/.")]
    digests = {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name in names}
    store.write_json("records/published.json", {"files": digests})
    card = model_card((folder / "job.yaml").read_text(), run, store.read_json("metrics.json"))
    store.write_bytes("model/README.md", card.encode())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, without the record of edits."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
