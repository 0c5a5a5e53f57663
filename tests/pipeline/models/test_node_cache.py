"""A model is fetched once per node, and must be the one that the run started with."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import pytest

import pipeline.models.fetching
from pipeline.errors import ModelError
from pipeline.models import node_cache
from pipeline.models.checkpoint import Checkpoint, digest_of_files
from pipeline.models.node_cache import KEPT_S, model_on_node, name_for_nodes
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.run_folder.folder import RunFolder
from pipeline.stages.context import Context
from pipeline.stages.publication import publish_model
from pipeline.storage.store import Store
from tests.conftest import GOLDEN

MODEL = GOLDEN / "gpt2" / "model"


@pytest.fixture
def remote(s3_url: str) -> str:
    """A model on S3."""
    store = Store(s3_url)
    for file in MODEL.iterdir():
        store.write_bytes(file.name, file.read_bytes())
    return s3_url


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the files that are fetched."""
    names: list[str] = []
    fetch = pipeline.models.fetching.fetch

    def counted(fs: fsspec.AbstractFileSystem, source: str, target: Path) -> None:
        names.append(source)
        fetch(fs, source, target)

    monkeypatch.setattr(pipeline.models.fetching, "fetch", counted)
    return names


def test_workers_of_a_node_fetch_a_model_once(
    remote: str, fetched: list[str], tmp_path: Path
) -> None:
    digest = Checkpoint.open(MODEL).digest()
    with ThreadPoolExecutor(4) as workers:
        folders = list(workers.map(lambda _: model_on_node(remote, digest, tmp_path), range(4)))
    assert len(set(folders)) == 1
    assert Checkpoint.open(folders[0]).digest() == digest
    assert len(fetched) == len(list(MODEL.iterdir()))


def test_a_copy_is_read_and_checked_once(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = Checkpoint.open(MODEL).digest()
    read: list[Any] = []
    check = Checkpoint.digest
    monkeypatch.setattr(Checkpoint, "digest", lambda self: read.append(self) or check(self))
    for _ in range(2):
        model_on_node(remote, digest, tmp_path)
    assert len(read) == 1


def _age(folder: Path) -> None:
    """Make a cache look as if nothing in it had been used for a long time."""
    long_ago = time.time() - KEPT_S - 60
    for entry in folder.iterdir():
        os.utime(entry, (long_ago, long_ago))


def test_unused_copies_are_deleted_when_another_is_fetched(
    remote: str, fetched: list[str], tmp_path: Path
) -> None:
    digest = Checkpoint.open(MODEL).digest()
    other = f"{remote}-edited"
    for file in MODEL.iterdir():
        Store(other).write_bytes(file.name, file.read_bytes())
    first = model_on_node(remote, digest, tmp_path)
    (tmp_path / f"{'0' * 32}.{'1' * 32}.tmp").mkdir()
    _age(tmp_path)
    # A copy that is used again is not old.
    os.utime(first)
    second = model_on_node(other, digest, tmp_path)
    assert {entry for entry in tmp_path.iterdir() if entry.is_dir()} == {first, second}
    _age(tmp_path)
    again = model_on_node(other, digest, tmp_path)
    assert {entry for entry in tmp_path.iterdir() if entry.is_dir()} == {again}
    assert Checkpoint.open(again).digest() == digest
    assert len(list(tmp_path.glob("*.checked"))) == 1


def test_models_that_the_user_keeps_in_the_cache_stay(remote: str, tmp_path: Path) -> None:
    mine = ("llama-7b", "0123456789abcdef", f"{'a' * 32}.safetensors", "notes.txt")
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"mine")
    (tmp_path / ("b" * 32)).symlink_to(tmp_path / "llama-7b")
    _age(tmp_path)
    model_on_node(remote, None, tmp_path)
    assert all((tmp_path / name / "model.safetensors").is_file() for name in mine)


def test_a_copy_that_is_removed_while_it_is_asked_for_is_fetched_again(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = node_cache.open_model_folder
    removed: list[Path] = []

    def and_removed(model: str, cache: Path) -> Path:
        folder = opened(model, cache)
        if not removed:
            shutil.rmtree(folder)
            removed.append(folder)
        return folder

    monkeypatch.setattr(node_cache, "open_model_folder", and_removed)
    digest = Checkpoint.open(MODEL).digest()
    assert Checkpoint.open(model_on_node(remote, digest, tmp_path)).digest() == digest
    assert removed


def test_a_base_whose_copy_is_gone_is_fetched_again_to_be_published(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "default_cache", lambda: tmp_path / "cache")
    checkpoint = Checkpoint.open(model_on_node(remote, None))
    base = ModelSource(remote, on_gpu=False, digest=checkpoint.digest())
    plan = SimpleNamespace(base=base, checkpoint=checkpoint)
    shutil.rmtree(checkpoint.folder)
    folder = RunFolder(str(tmp_path / "run"))
    folder.begin({"job": "1"}, seed=0)
    publish_model(Context(cast(Any, plan), folder, cast(Any, None), Progress()), [])
    assert Checkpoint.open(tmp_path / "run" / "model").digest() == base.digest


def test_a_model_that_has_changed_meanwhile_is_refused(remote: str, tmp_path: Path) -> None:
    digest = Checkpoint.open(MODEL).digest()
    model_on_node(remote, digest, tmp_path)
    weights = (MODEL / "model.safetensors").read_bytes()
    Store(remote).write_bytes("model.safetensors", weights[:-1] + b"\xff")
    with pytest.raises(ModelError, match="has changed since the run began, or was damaged"):
        model_on_node(remote, digest, tmp_path)


def test_the_error_about_a_folder_missing_on_a_node_names_the_node() -> None:
    with pytest.raises(ModelError, match=r"/nowhere/model is not on \S+: put it on a disk that"):
        model_on_node("/nowhere/model", None)


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert model_on_node(str(MODEL), "whatever") == MODEL
    assert model_on_node(f"file://{MODEL}", "whatever") == MODEL


def test_nodes_get_the_location_of_what_they_can_find(tmp_path: Path) -> None:
    here = tmp_path / "copy"
    assert name_for_nodes("s3://models/base", here) == "s3://models/base"
    assert name_for_nodes("openai-community/gpt2", here) == "openai-community/gpt2"
    assert name_for_nodes("memory://models/base", here) == str(here)
    shutil.copytree(MODEL, here)
    assert name_for_nodes(f"file://{here}", here) == str(here)


def test_a_models_digest_follows_from_those_of_its_files() -> None:
    store = Store(MODEL)
    digests = {name: store.sha256(name) for name in store.list()}
    assert digest_of_files(digests) == Checkpoint.open(MODEL).digest()
