"""Copies of remote model folders: complete or absent, fetched once, and again after a change."""

from __future__ import annotations

import uuid
from pathlib import Path

import boto3
import pytest

from pipeline.errors import ModelError, StorageError
from pipeline.models.fetching import is_hub_id, localized
from pipeline.storage import retries
from pipeline.storage.store import Store


@pytest.fixture(params=["memory", "s3"])
def store(request):
    """A folder that is not on this machine."""
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_url"))
    return Store(f"memory://{uuid.uuid4().hex}/run")


def test_a_model_folder_is_copied_once(store, tmp_path, monkeypatch):
    store.write_bytes("m/config.json", b"{}")
    store.write_bytes("m/sub/w.safetensors", b"w" * 1000)
    folder = Path(localized(store.join("m"), tmp_path / "cache"))
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "sub" / "w.safetensors").read_bytes() == b"w" * 1000
    monkeypatch.setattr(store.fs, "get_file", None)
    assert localized(store.join("m"), tmp_path / "cache") == str(folder)
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_changed_model_is_copied_anew(store, tmp_path):
    store.write_bytes("m/w", b"one")
    first = localized(store.join("m"), tmp_path)
    store.write_bytes("m/w", b"two")
    second = localized(store.join("m"), tmp_path)
    assert Path(first, "w").read_bytes() == b"one"
    assert Path(second, "w").read_bytes() == b"two"


def test_a_copy_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    store.write_bytes("m/1", b"1")
    store.write_bytes("m/2", b"2")
    get_file = store.fs.get_file

    def failing(source, target):
        if source.endswith("2"):
            raise TimeoutError("no answer")
        return get_file(source, target)

    monkeypatch.setattr(store.fs, "get_file", failing)
    monkeypatch.setattr(retries, "PATIENCE_S", 0)
    with pytest.raises(StorageError, match=r"cannot copy .*m/2 \(no answer\)"):
        localized(store.join("m"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_where_a_file_is_copied_to(store, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    store.write_bytes("m/w", b"one")
    monkeypatch.setattr(store.fs, "get_file", full)
    said = rf"^cannot write {tmp_path}/.*/w \(.*No space left on device\); make room there"
    with pytest.raises(StorageError, match=said):
        localized(store.join("m"), tmp_path)
    with (
        pytest.raises(StorageError, match=r"^cannot write /.*/w \(.*; make room there"),
        store.local_copy("m/w"),
    ):
        pass


def test_a_missing_model_is_named(store, tmp_path):
    with pytest.raises(ModelError) as caught:
        localized(store.join("no-model"), tmp_path)
    assert str(caught.value) == (
        f"there is no model at {store.join('no-model')}: no files there; check the URL"
    )


def test_keys_that_lead_out_of_the_cache_are_refused(s3_url, tmp_path):
    store = Store(s3_url)
    bucket = store.root.split("/")[0]
    boto3.client("s3").put_object(Bucket=bucket, Key="runs/1/m/../../../evil", Body=b"x")
    with pytest.raises(StorageError, match="outside its folder"):
        localized(store.join("m"), tmp_path / "cache")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["/models/gpt2", "org/name", "gpt2", "./a", "../b"])
def test_local_models_and_hub_ids_stay_as_they_are(name, tmp_path):
    assert localized(name, tmp_path) == name
    assert list(tmp_path.iterdir()) == []


def test_a_model_at_a_file_url_is_local(tmp_path):
    assert localized(f"file://{tmp_path}/m", tmp_path) == f"{tmp_path}/m"


@pytest.mark.parametrize(
    ("model", "on_hub"),
    [
        *(("org/name", True), ("gpt2", True), ("org/name/more", False), ("./a", False)),
        *(("/models/gpt2", False), ("~/gpt2", False), ("s3://bucket/a", False), ("here", False)),
    ],
)
def test_a_hub_id_is_no_path_no_url_and_no_folder_here(model, on_hub, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(model) == on_hub
