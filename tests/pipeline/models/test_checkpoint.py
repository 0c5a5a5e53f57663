"""Publishing: only the edited tensors change, and not a single other byte."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import ModelError, StorageError
from pipeline.models.checkpoint import Checkpoint, publish
from pipeline.models.opening import open_model_folder
from pipeline.storage.store import Store
from pmet import NotFiniteError
from tests.conftest import GOLDEN

BASE = GOLDEN / "gpt2" / "model"
NAME = "transformer.h.1.mlp.c_proj.weight"


def published(base: Path, target: Path, names: set[str]) -> list[str]:
    files: list[str] = []
    publish(
        Checkpoint.open(base),
        names,
        lambda _name, tensor: tensor + 1,
        Store(target),
        "model",
        on_file=files.append,
    )
    return files


def test_only_the_edited_tensors_change(tmp_path: Path) -> None:
    files = published(BASE, tmp_path, {NAME})
    assert sorted(files) == sorted(f.name for f in BASE.iterdir())
    old, new = (
        load_file(BASE / "model.safetensors"),
        load_file(tmp_path / "model/model.safetensors"),
    )
    assert torch.equal(new.pop(NAME), old.pop(NAME) + 1)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[n].view(torch.uint8), old[n].view(torch.uint8)) for n in old)
    for file in set(files) - {"model.safetensors"}:
        assert (tmp_path / "model" / file).read_bytes() == (BASE / file).read_bytes()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert opened.get_parameter(NAME).isfinite().all()


def test_a_sharded_16_bit_checkpoint_without_prefix(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    # GPT-2's hub checkpoints omit the prefix of the model with a head.
    short = {n.removeprefix("transformer."): t.bfloat16() for n, t in tensors.items()}
    names = sorted(short)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({n: short[n] for n in held}, str(base / file), metadata={"format": "pt"})
    index = {"weight_map": {n: f for f, held in shards.items() for n in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = Checkpoint.open(base).find(NAME, "transformer")
    assert (stored.name, stored.dtype) == (NAME.removeprefix("transformer."), torch.bfloat16)
    published(base, tmp_path, {stored.name})
    with safe_open(str(tmp_path / "model" / stored.file), framework="pt") as file:
        assert torch.equal(file.get_tensor(stored.name), short[stored.name] + 1)
        others = [n for n in file.keys() if n != stored.name]  # noqa: SIM118
        assert all(torch.equal(file.get_tensor(n), short[n]) for n in others)


def test_an_object_store_gets_the_same_bytes(tmp_path: Path) -> None:
    published(BASE, tmp_path, {NAME})
    remote = Store("memory://publish-test")
    publish(
        Checkpoint.open(BASE), {NAME}, lambda _n, t: t + 1, remote, "model", on_file=lambda _f: None
    )
    local = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert remote.read_bytes("model/model.safetensors") == local
    remote.delete("model")


def test_half_a_checkpoint_cannot_be_opened(tmp_path: Path) -> None:
    published(BASE, tmp_path, {NAME})
    AutoConfig.from_pretrained(tmp_path / "model")
    files = len(Checkpoint.open(BASE).files())
    (tmp_path / "model" / "left.over").touch()

    def broken(name: str) -> None:
        written.append(name)
        if len(written) == files - 1:
            raise OSError("no room")

    written: list[str] = []
    with pytest.raises(OSError, match="no room"):
        publish(
            Checkpoint.open(BASE), {NAME}, lambda _n, t: t, Store(tmp_path), "model", on_file=broken
        )
    assert "model.safetensors" in written
    # The caller must remove files that the base does not have.
    assert (tmp_path / "model" / "left.over").exists()
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoConfig.from_pretrained(tmp_path / "model", local_files_only=True)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(BASE, copy)
    before = Checkpoint.open(BASE).digest()
    assert Checkpoint.open(copy).digest() == before
    published(BASE, tmp_path, {NAME})
    assert Checkpoint.open(tmp_path / "model").digest() != before


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="is not a folder"):
        open_model_folder(str(tmp_path / "none"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="give a complete checkpoint"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickle can run code"):
        Checkpoint.open(tmp_path)
    data = (BASE / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ModelError, match="cut short"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="does not store lm_head"):
        Checkpoint.open(BASE).find("lm_head.weight", "transformer")


def test_pickles_are_neither_named_nor_copied(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    clean, digest = Checkpoint.open(base).files(), Checkpoint.open(base).digest()
    for name in ("a.bin", "training_args.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.pickle"):
        (base / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert Checkpoint.open(base).files() == clean
    assert Checkpoint.open(base).digest() == digest
    assert sorted(published(base, tmp_path, {NAME})) == clean
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == clean


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999]}}',
        b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}    ',
        b'{"w": 1}',
        b"[]",
    ],
    ids=["deep", "outside", "no offsets", "too few", "no entry", "no mapping"],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 1e39])
def test_what_is_not_finite_as_it_is_stored_is_never_published(tmp_path: Path, odd: float) -> None:
    with pytest.raises(NotFiniteError) as error:
        publish(
            Checkpoint.open(BASE),
            {NAME},
            lambda _n, t: torch.full(t.shape, odd, dtype=torch.float64),
            Store(tmp_path),
            "model",
            on_file=lambda _f: None,
        )
    assert str(error.value).startswith(
        f"the edited tensor {NAME} holds NaN or infinity as torch.float32 and is not published"
    )
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_change_of_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="became"):
        publish(
            Checkpoint.open(BASE),
            {NAME},
            lambda _n, t: t[:1],
            Store(tmp_path),
            "model",
            on_file=lambda _f: None,
        )
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_weights_that_are_not_read_do_not_belong_to_the_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    clean, digest = Checkpoint.open(base).files(), Checkpoint.open(base).digest()
    shutil.copy(base / "model.safetensors", base / "model_backup.safetensors")
    others = ("adapter_model.safetensors", "a.gguf", "a.onnx", "tf_model.h5", "adapter_config.json")
    for name in (*others, "model.fp16.safetensors.index.json"):
        (base / name).write_bytes(b"{}")
    assert Checkpoint.open(base).digest() == digest
    assert sorted(published(base, tmp_path, {NAME})) == clean
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = load_file(base / "model.safetensors")[NAME]
    assert torch.equal(opened.get_parameter(NAME), before + 1)


def test_the_digest_of_an_ordinary_checkpoint_stays() -> None:
    """Stores of targets and second moments use it as a key."""
    digest = "90d4fd1d949845d1746f8d77b3900f8e4b578f494aa7e2947e305ed0ba27575a"
    assert Checkpoint.open(BASE).digest() == digest


def damage(store: Store) -> None:
    stored = Checkpoint.open(BASE).tensors[NAME]
    data = bytearray(store.read_bytes("model/model.safetensors"))
    data[stored.start + stored.size // 2] ^= 1
    store.write_bytes("model/model.safetensors", bytes(data))


def cut(store: Store) -> None:
    data = store.read_bytes("model/model.safetensors")
    store.write_bytes("model/model.safetensors", data[:-100])


def lose(store: Store) -> None:
    store.delete("model/model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, f"published without the edit of {NAME}: the files there do not hold"),
        (cut, r"cannot be read back: .*cut short"),
        (lose, f"published without the edit of {NAME}"),
    ],
)
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_what_is_published_is_read_back(
    tmp_path: Path, change: Callable[[Store], None], message: str, remote: bool
) -> None:
    store = Store("memory://read-back" if remote else tmp_path)

    def on_file(name: str) -> None:
        if name == "model.safetensors":
            change(store)

    with pytest.raises(StorageError, match=message):
        publish(Checkpoint.open(BASE), {NAME}, lambda _n, t: t + 1, store, "model", on_file=on_file)
    assert not store.exists("model/config.json")
    store.delete("model")
