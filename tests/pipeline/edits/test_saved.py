"""Saved edits: what is opened, what is refused, and what identifies an edit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.edits.saved import opened_edit
from pipeline.errors import RunFolderError
from pipeline.storage.store import Store
from pmet import Edit, EditFileError
from tests.saved_edits import base, names_of, save_edit


@pytest.fixture
def edit(tmp_path: Path) -> Path:
    return save_edit(base("gpt2"), names_of("gpt2"), tmp_path / "edit.safetensors")


def digest_of(source: Path | str) -> str:
    with opened_edit(str(source)) as found:
        return found.digest


def refused(source: Path | str) -> str:
    with pytest.raises((EditFileError, RunFolderError)) as caught, opened_edit(str(source)):
        pass
    return str(caught.value)


def test_an_edit_is_the_same_in_one_file_in_several_and_elsewhere(
    edit: Path, tmp_path: Path
) -> None:
    loaded = Edit.load(edit)
    for number, name in enumerate(loaded.deltas):
        folder = tmp_path / "delta"
        folder.mkdir(exist_ok=True)
        one = Edit({name: loaded.deltas[name]}, {name: loaded.originals[name]})
        one.save(folder / f"{number}.safetensors")
    remote = Store("memory://edits")
    remote.write_bytes("e.safetensors", edit.read_bytes())
    digests = {digest_of(s) for s in (edit, tmp_path / "delta", remote.join("e.safetensors"))}
    assert len(digests) == 1
    other = save_edit(base("gpt2"), names_of("gpt2"), tmp_path / "other.safetensors", seed=1)
    assert digest_of(other) not in digests
    with opened_edit(str(edit)) as found:
        assert (found.source, found.base, found.warning) == (str(edit), None, None)
        name = names_of("gpt2")[0]
        part = found.weights[name].part()
        assert torch.equal(part.delta(), loaded.deltas[name])
        own = part.original(torch.float32)
        assert own is not None
        assert torch.equal(own, loaded.originals[name])
        assert part.original(torch.float16) is None


def test_what_is_no_edit_is_named(edit: Path, tmp_path: Path) -> None:
    assert "none is neither a run nor a saved edit (nothing there)" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    assert "it has neither run.json nor *.safetensors" in refused(tmp_path / "empty")
    assert "model.safetensors is not a saved edit (pmet-edit-1)" in refused(base("gpt2"))
    data = edit.read_bytes()
    edit.write_bytes(data[:-9])
    assert "cannot be read as a saved edit (it is cut short); is the file complete?" in refused(
        edit
    )
    name = "a.weight"
    meta = {"format": "pmet-edit-1"}
    half = {f"delta.{name}": torch.zeros(2, 3).double()}
    for tensors in (half, half | {f"original.{name}": torch.zeros(3, 2)}):
        save_file(tensors, str(edit), metadata=meta)
        assert f"holds no complete edit of {name}: it needs delta.{name}" in refused(edit)
    save_file({}, str(edit), metadata=meta)
    assert "holds no edit: it has no tensors" in refused(edit)


def test_two_edits_of_one_weight_are_refused(edit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(edit.read_bytes())
    assert f"holds two edits of {names_of('gpt2')[0]}; name one edit file" in refused(folder)


def run_with(folder: Path, **changes: Any) -> Path:
    """A folder with the status of a run, as far as the edit needs it."""
    status = {
        "status": "complete",
        "digests": {"model": "0123"},
        "versions": {"pmet-pipeline": "1"},
        "layers": [],
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(status | changes))
    return folder


def test_the_edit_of_a_run_is_what_its_record_names(edit: Path, tmp_path: Path) -> None:
    layer = {
        "file": "delta/a.safetensors",
        "sha256": hashlib.sha256(edit.read_bytes()).hexdigest(),
    }
    run = run_with(tmp_path / "run", layers=[layer])
    assert "delta/a.safetensors is missing, which run.json names" in refused(run)
    (run / "delta").mkdir()
    (run / "delta" / "a.safetensors").write_bytes(edit.read_bytes())
    # Left by an attempt that never finished.
    (run / "delta" / "b.safetensors").write_bytes(b"half")
    with opened_edit(str(run)) as found:
        assert (found.digest, found.base, found.warning) == (digest_of(edit), "0123", None)
    run_with(run, layers=[layer], status="held")
    with opened_edit(str(run)) as found:
        assert found.warning is not None
        assert "a gate held the edited model" in found.warning
    data = bytearray(edit.read_bytes())
    data[-1] ^= 1
    (run / "delta" / "a.safetensors").write_bytes(data)
    assert "delta/a.safetensors is damaged: its SHA-256 is not the one in run.json" in refused(run)


def test_runs_without_an_edit_are_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    assert "edited nothing, because the model knew all facts" in refused(run)
    run_with(run, status="failed")
    assert "has no finished update (it is failed); run its job again" in refused(run)
    run_with(run, layers=[{"parameter": "a"}])
    assert "run.json does not say which files hold the edit" in refused(run)
    (run / "run.json").write_text('{"status": "complete"}')
    assert "run.json was not written by a run of pmet" in refused(run)
    (run / "run.json").write_text("{")
    assert "run.json is damaged" in refused(run)
