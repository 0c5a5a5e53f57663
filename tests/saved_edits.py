"""Edits, models and folders for the tests of `pmet apply` and `pmet revert`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.models.checkpoint import Checkpoint
from pmet import Edit
from tests.conftest import GOLDEN

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
    model: Path, names: list[str], file: Path, *, seed: int = 0, size: float = 0.05
) -> Path:
    """Save a random edit of a model's weights: ``size`` is that of an element of Δ."""
    weights = weights_of(model)
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        name: size * torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
        for name in names
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    Edit(deltas, {name: weights[name] for name in names}).save(file)
    return file


def content(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, without the record of edits."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
