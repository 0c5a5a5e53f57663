"""The files that hold a model's weights: always those that transformers opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from tests.conftest import GOLDEN

BASE = GOLDEN / "gpt2" / "model"
NAME = "transformer.h.1.mlp.c_proj.weight"
INDEX = "model.safetensors.index.json"
ALL = load_file(BASE / "model.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with configuration and tokenizer, and no weights."""
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def single(folder: Path, added: float, name: str = "model.safetensors") -> None:
    tensors = {n: t + added if n == NAME else t for n, t in ALL.items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


def sharded(folder: Path, added: float, index: str = INDEX) -> None:
    names = sorted(ALL)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        tensors = {n: ALL[n] + added if n == NAME else ALL[n] for n in held}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {n: file for file, held in shards.items() for n in held}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def backup(folder: Path) -> None:
    single(folder, 1.0)
    single(folder, 2.0, "model_backup.safetensors")
    single(folder, 3.0, "a_copy.safetensors")


def single_and_sharded(folder: Path) -> None:
    single(folder, 1.0)
    sharded(folder, 2.0)


def sharded_with_copies(folder: Path) -> None:
    sharded(folder, 1.0)
    single(folder, 2.0, "consolidated.safetensors")
    single(folder, 3.0, "z.safetensors")


def named_in_the_configuration(folder: Path) -> None:
    single(folder, 1.0)
    single(folder, 2.0, "other.safetensors")
    configured(folder, transformers_weights="other.safetensors")


def index_named_in_the_configuration(folder: Path) -> None:
    single(folder, 1.0)
    sharded(folder, 2.0, "other.safetensors.index.json")
    configured(folder, transformers_weights="other.safetensors.index.json")


@pytest.mark.parametrize(
    "make",
    [
        backup,
        single_and_sharded,
        sharded_with_copies,
        named_in_the_configuration,
        index_named_in_the_configuration,
    ],
)
def test_the_tensors_are_those_that_transformers_opens(
    model: Path, make: Callable[[Path], None]
) -> None:
    make(model)
    checkpoint = Checkpoint.open(model)
    opened = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    assert torch.equal(checkpoint.read(checkpoint.tensors[NAME]), opened.get_parameter(NAME))
    files = {file for file in checkpoint.files() if "safetensors" in file}
    assert {t.file for t in checkpoint.tensors.values()} <= files
    assert files == {*checkpoint.weights.names, checkpoint.weights.index} - {None}


def test_a_missing_shard_is_named(model: Path) -> None:
    sharded(model, 0.0)
    (model / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names 2 files, of which b\.safetensors is missing"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NAME: "a.safetensors"}, rf"{NAME} is in a\.safetensors, but it is in b\.safetensors"),
        ({"w": "a.safetensors"}, r"w is in a\.safetensors, but no file has it"),
        ({"w": "../a.safetensors"}, "not an index .* the name of a file beside the index"),
        ({"w": 3}, "not an index .* the name of a file beside the index"),
    ],
    ids=["elsewhere", "nowhere", "outside", "number"],
)
def test_an_index_that_is_wrong_is_refused(
    model: Path, change: dict[str, Any], message: str
) -> None:
    sharded(model, 0.0)
    index = json.loads((model / INDEX).read_text())
    assert index["weight_map"][NAME] == "b.safetensors"
    index["weight_map"] |= change
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(model)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_refused(model: Path, text: str) -> None:
    sharded(model, 0.0)
    (model / INDEX).write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is not an index of safetensors files"):
        Checkpoint.open(model)


def test_a_tensor_that_is_stored_twice_is_refused(model: Path) -> None:
    sharded(model, 0.0)
    first = load_file(model / "a.safetensors")
    save_file(first | {NAME: ALL[NAME] + 1}, model / "a.safetensors")
    with pytest.raises(ModelError, match=rf"b\.safetensors and .*a\.safetensors both store {NAME}"):
        Checkpoint.open(model)
    entry = b'"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    header = b"{" + entry + b", " + entry + b"}"
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole .*it names w twice"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["none.safetensors", "weights.bin", "../model.safetensors", 3])
def test_weights_named_in_the_configuration_must_be_there(model: Path, name: Any) -> None:
    single(model, 0.0)
    configured(model, transformers_weights=name)
    with pytest.raises(ModelError, match=r"config\.json: transformers_weights .*(missing|correct)"):
        Checkpoint.open(model)


def test_weights_under_another_name_are_refused(model: Path) -> None:
    single(model, 0.0, "weights.safetensors")
    with pytest.raises(ModelError, match=r"only weights\.safetensors: it reads model\.safetensors"):
        Checkpoint.open(model)
