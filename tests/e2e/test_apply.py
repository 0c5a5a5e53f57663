"""The edit of a real run, put on its base and taken off the model that the run published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.edits.rewriting import apply_edit, revert_edit
from pipeline.errors import ModelError
from pipeline.storage.store import Store
from tests.e2e.conftest import Runner
from tests.saved_edits import base, content, copy_as, names_of, save_edit

SMALL = {"evaluate": {"sample": 2, "answers": 0}}


@pytest.fixture(scope="module")
def sharded(shared: Path) -> Path:
    """A 16-bit base in two files; on a CPU, its run saves float32 values."""
    folder = shared / "sharded"
    return (
        folder if folder.exists() else copy_as(base("llama"), folder, torch.bfloat16, shards=True)
    )


def without_card(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name != "README.md"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_applied_run_is_the_model_that_it_published(
    family: str, run: Runner, sharded: Path, tmp_path: Path
) -> None:
    result = run("gpt2") if family == "gpt2" else run("llama", model=str(sharded), **SMALL)
    model = base("gpt2") if family == "gpt2" else sharded
    published = Path(result.folder.url) / "model"
    # A README of the base's own stays, unlike the card of a run.
    own = tmp_path / "base"
    shutil.copytree(model, own)
    (own / "README.md").write_text("# A base model\n")
    on = apply_edit(result.folder.url, str(own), str(tmp_path / "on"))
    assert on.count("exact") == len(on.tensors) > 1
    assert without_card(tmp_path / "on") == without_card(published)
    assert (tmp_path / "on" / "README.md").read_text() == "# A base model\n"
    delta = apply_edit(f"{result.folder.url}/delta", str(own), str(tmp_path / "delta"))
    assert content(delta.store.local_path() or Path()) == content(tmp_path / "on")
    off = revert_edit(result.folder.url, str(tmp_path / "on"), str(tmp_path / "off"))
    assert (off.is_base, off.without_card) == (True, False)
    assert content(tmp_path / "off") == content(own)
    # The published model has no record, and a card that describes no other model.
    off = revert_edit(result.folder.url, str(published), str(tmp_path / "plain"))
    assert (off.is_base, off.without_card, off.count("exact")) == (True, True, len(on.tensors))
    assert content(tmp_path / "plain") == without_card(model)


def test_the_whole_base_is_checked_by_its_digest(run: Runner, tmp_path: Path) -> None:
    result = run("gpt2")
    other = copy_as(base("gpt2"), tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("{", '{"note": 1,', 1))
    with pytest.raises(
        ModelError, match=r"is not the base of the run .* the weights to change are"
    ):
        apply_edit(result.folder.url, str(other), str(tmp_path / "on"))
    on = apply_edit(result.folder.url, str(other), str(tmp_path / "on"), force=True)
    assert (on.other_rest, on.count("exact")) == (True, len(on.tensors))
    off = revert_edit(result.folder.url, str(tmp_path / "on"), str(tmp_path / "off"))
    assert off.is_base is False
    assert content(tmp_path / "off") == content(other)


def test_a_run_stacks_on_other_edits_of_its_base(run: Runner, tmp_path: Path) -> None:
    result, model = run("gpt2"), base("gpt2")
    edit = save_edit(model, names_of("gpt2"), tmp_path / "edit.safetensors")
    one = apply_edit(str(edit), str(model), str(tmp_path / "one"))
    two = apply_edit(result.folder.url, str(tmp_path / "one"), str(tmp_path / "two"))
    assert two.count("stacked") > 0
    assert not two.other_rest
    assert two.carried == (str(edit), result.folder.url)
    alone = revert_edit(str(edit), str(tmp_path / "two"), str(tmp_path / "alone"))
    assert alone.count("exact") == len(one.tensors)
    assert without_card(tmp_path / "alone") == without_card(Path(result.folder.url) / "model")
    # What else changed in a model that carries edits is noticed.
    config = tmp_path / "one" / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))
    with pytest.raises(ModelError, match="other files or weights are not"):
        apply_edit(result.folder.url, str(tmp_path / "one"), str(tmp_path / "three"))
    assert Store(tmp_path / "three").entries() == []
