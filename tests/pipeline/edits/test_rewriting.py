"""Whole checkpoints with an edit put on or taken off: on disk and elsewhere, killed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from pipeline.edits import output as output_folder
from pipeline.edits import rewriting
from pipeline.edits.rewriting import apply_edit, revert_edit
from pipeline.edits.saved import opened_edit
from pipeline.errors import (
    FolderBusyError,
    JobError,
    ModelError,
    OutputError,
    StorageError,
)
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.opening import open_model_folder
from pipeline.storage.store import Store
from pmet import Edit, EditFileError
from tests.conftest import ROOT
from tests.saved_edits import (
    base,
    content,
    copy_as,
    names_of,
    save_edit,
    weights_of,
)

RECORD = ".pmet_edits/edits.json"


def applied(edit: Path, model: Path) -> dict[str, torch.Tensor]:
    """The weights that a model has once the edit is added, as the library adds it."""
    loaded = Edit.load(edit)
    weights = weights_of(model)
    for name, delta in loaded.deltas.items():
        weights[name] = (weights[name].double() + delta).to(weights[name].dtype)
    return weights


def assert_equal_bytes(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("family", "dtype", "shards"),
    [
        ("gpt2", torch.float32, False),
        ("gpt2", torch.float16, True),
        ("llama", torch.bfloat16, False),
        ("llama", torch.float32, True),
    ],
)
def test_on_and_off_again(family: str, dtype: torch.dtype, shards: bool, tmp_path: Path) -> None:
    model = copy_as(base(family), tmp_path / "base", dtype, shards=shards)
    edit = save_edit(model, names_of(family), tmp_path / "edit.safetensors")
    on = apply_edit(str(edit), str(model), str(tmp_path / "on"))
    assert (on.count("exact"), on.carried) == (2, (str(edit),))
    assert_equal_bytes(weights_of(tmp_path / "on"), applied(edit, model))
    others = {n: data for n, data in content(model).items() if not n.endswith(".safetensors")}
    assert others.items() <= content(tmp_path / "on").items()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "on", dtype="auto")
    with torch.no_grad():
        Edit.load(edit).revert(opened)
    off = revert_edit(str(edit), str(tmp_path / "on"), str(tmp_path / "off"))
    assert (off.count("exact"), off.carried, off.is_base) == (2, (), None)
    assert content(tmp_path / "off") == content(model)
    assert not (tmp_path / "off" / ".pmet_edits").exists()


def test_from_and_to_any_storage(any_url: str, tmp_path: Path) -> None:
    model = copy_as(base("llama"), tmp_path / "base", torch.bfloat16, shards=True)
    remote = Store(any_url)
    for name, data in content(model).items():
        remote.write_bytes(f"base/{name}", data)
    edits = [
        save_edit(model, names_of("llama"), tmp_path / f"{n}.safetensors", seed=n) for n in range(2)
    ]
    for number, edit in enumerate(edits):
        remote.write_bytes(f"edits-{number}/delta/x.safetensors", edit.read_bytes())
    urls = [remote.join(f"edits-{n}/delta") for n in range(2)]
    cache = tmp_path / "cache"
    apply_edit(urls[0], remote.join("base"), remote.join("one"), cache_dir=cache)
    two = apply_edit(
        f"{urls[1]}/x.safetensors", remote.join("one"), remote.join("two"), cache_dir=cache
    )
    assert (two.count("stacked"), len(two.carried)) == (2, 2)
    apply_edit(str(edits[0]), str(model), str(tmp_path / "one"))
    apply_edit(str(edits[1]), str(tmp_path / "one"), str(tmp_path / "two"))
    for name, data in content(tmp_path / "two").items():
        assert remote.read_bytes(f"two/{name}") == data
    # The lower one first: the upper one is read again from the storage.
    off = revert_edit(urls[0], remote.join("two"), remote.join("off"), cache_dir=cache)
    assert (off.count("exact"), len(off.carried)) == (2, 1)
    revert_edit(urls[1], remote.join("off"), str(tmp_path / "off"), cache_dir=cache)
    assert content(tmp_path / "off") == content(model)


def test_three_edits_come_off_in_all_orders(tmp_path: Path) -> None:
    model = copy_as(base("llama"), tmp_path / "base", torch.bfloat16, shards=True)
    layers = ((0, 1), (1,), (0,))
    edits = [
        save_edit(model, names_of("llama", some), tmp_path / f"{n}.safetensors", seed=n)
        for n, some in enumerate(layers)
    ]
    wanted = {(): content(model)}
    for count in range(1, 4):
        for some in combinations(range(3), count):
            below = model if count == 1 else tmp_path / f"on-{some[:-1]}"
            apply_edit(str(edits[some[-1]]), str(below), str(tmp_path / f"on-{some}"))
            wanted[some] = content(tmp_path / f"on-{some}")
    for order in permutations(range(3)):
        here, rest = tmp_path / "on-(0, 1, 2)", (0, 1, 2)
        for number in order:
            rest = tuple(n for n in rest if n != number)
            name = tmp_path / f"off-{order}-{rest}"
            off = revert_edit(str(edits[number]), str(here), str(name))
            assert off.count("exact") == len(layers[number])
            assert content(name) == wanted[rest]
            assert off.carried == tuple(str(edits[n]) for n in rest)
            here = name


def test_a_record_does_not_decide_which_servers_are_contacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = base("llama"), names_of("llama")
    low, high = (save_edit(model, names, tmp_path / f"{i}.safetensors", seed=i) for i in (0, 1))
    apply_edit(str(low), str(model), str(tmp_path / "one"))
    apply_edit(str(high), str(tmp_path / "one"), str(tmp_path / "both"))
    record = tmp_path / "both" / RECORD
    record.write_text(record.read_text().replace(str(high), "https://elsewhere.test/1.safetensors"))
    opened: list[str] = []

    def noted(source: str) -> Any:
        opened.append(source)
        return opened_edit(source)

    monkeypatch.setattr(rewriting, "opened_edit", noted)
    reverted = revert_edit(str(low), str(tmp_path / "both"), str(tmp_path / "out"))
    assert opened == [str(low)]
    assert reverted.count("rounded") == len(names)


def test_edits_that_are_gone_leave_rounding_until_the_last_one(tmp_path: Path) -> None:
    model = copy_as(base("llama"), tmp_path / "base", torch.bfloat16)
    edits = [
        save_edit(model, names_of("llama"), tmp_path / f"{n}" / "e.safetensors", seed=n)
        for n in range(2)
    ]
    apply_edit(str(edits[0]), str(model), str(tmp_path / "one"))
    apply_edit(str(edits[1]), str(tmp_path / "one"), str(tmp_path / "two"))
    moved = edits[1].rename(tmp_path / "moved.safetensors")
    off = revert_edit(str(edits[0]), str(tmp_path / "two"), str(tmp_path / "off"))
    assert off.count("rounded") == 2
    elements, by = off.rounding("rounded")
    alone = applied(moved, model)
    apart = [
        (tensor.double() - alone[name].double()).abs()
        for name, tensor in weights_of(tmp_path / "off").items()
    ]
    assert 0 < max(float(a.max()) for a in apart) <= by
    assert sum(int(a.count_nonzero()) for a in apart) <= elements
    last = revert_edit(str(moved), str(tmp_path / "off"), str(tmp_path / "base-again"))
    assert last.count("exact") == 2
    assert content(tmp_path / "base-again") == content(model)


def test_a_forced_edit_comes_off_to_the_byte(tmp_path: Path) -> None:
    model = copy_as(base("gpt2"), tmp_path / "base", torch.float16)
    other = copy_as(base("gpt2"), tmp_path / "other", torch.float16)
    save_edit(other, names_of("gpt2"), tmp_path / "0.safetensors", size=0.01)
    apply_edit(str(tmp_path / "0.safetensors"), str(other), str(tmp_path / "another"))
    edit = save_edit(tmp_path / "another", names_of("gpt2"), tmp_path / "1.safetensors", size=30)
    with pytest.raises(EditFileError, match=r"is not the edit's base: .* give --force to add Δ"):
        apply_edit(str(edit), str(model), str(tmp_path / "on"))
    assert not (tmp_path / "on").exists()
    on = apply_edit(str(edit), str(model), str(tmp_path / "on"), force=True)
    assert on.count("forced") == 2
    assert list((tmp_path / "on" / ".pmet_edits").glob("*.zst"))
    assert_equal_bytes(weights_of(tmp_path / "on"), applied(edit, model))
    # What is kept travels with a model that another edit changes in one of the weights only.
    above = save_edit(tmp_path / "on", names_of("gpt2")[:1], tmp_path / "2.safetensors")
    apply_edit(str(above), str(tmp_path / "on"), str(tmp_path / "above"))
    revert_edit(str(above), str(tmp_path / "above"), str(tmp_path / "on-again"))
    assert content(tmp_path / "on-again") == content(tmp_path / "on")
    off = revert_edit(str(edit), str(tmp_path / "on-again"), str(tmp_path / "off"))
    assert off.count("exact") == 2
    assert content(tmp_path / "off") == content(model)


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.1.mlp.experts.down_proj"
    weight = model.get_parameter(name).detach().clone()
    delta = torch.randn(weight.shape, dtype=torch.float64)
    delta[2] = 0
    Edit({name: delta}, {name: weight}).save(tmp_path / "edit.safetensors")
    on = apply_edit(
        str(tmp_path / "edit.safetensors"), str(tmp_path / "base"), str(tmp_path / "on")
    )
    assert on.count("exact") == 4
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "on")
    assert torch.equal(opened.get_parameter(name), (weight.double() + delta).float())
    revert_edit(str(tmp_path / "edit.safetensors"), str(tmp_path / "on"), str(tmp_path / "off"))
    assert content(tmp_path / "off") == content(tmp_path / "base")


def test_the_record_is_no_part_of_the_model(tmp_path: Path) -> None:
    model, edit = base("gpt2"), tmp_path / "edit.safetensors"
    save_edit(model, names_of("gpt2"), edit)
    apply_edit(str(edit), str(model), str(tmp_path / "on"))
    digest = Checkpoint.open(tmp_path / "on").digest()
    record = json.loads((tmp_path / "on" / RECORD).read_text())
    assert record["model"] == digest
    assert [e["on"] for e in record["edits"]] == [Checkpoint.open(model).digest()]
    assert ".pmet_edits" not in {*Checkpoint.open(tmp_path / "on").files()}
    outside = {**record, "edits": [{**record["edits"][0], "id": "../../secret"}]}
    for damaged in ("{", "[]", json.dumps({**record, "now": 1}), json.dumps(outside)):
        (tmp_path / "on" / RECORD).write_text(damaged)
        with pytest.raises(ModelError, match=r"edits\.json is not a record of edits .* delete the"):
            revert_edit(str(edit), str(tmp_path / "on"), str(tmp_path / "off"))
    # Without the record the weights show that the edit is there.
    (tmp_path / "on" / RECORD).unlink()
    off = revert_edit(str(edit), str(tmp_path / "on"), str(tmp_path / "off"))
    assert off.count("exact") == 2
    assert content(tmp_path / "off") == content(model)


# The other process: it dies by SIGKILL once it has written some files.
KILLED = """
import os, signal, sys
from pipeline.edits import rewriting
checked, files = rewriting.check_claim, []
def check(store, token):
    files.append(token)
    if len(files) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    checked(store, token)
rewriting.check_claim = check
rewriting.apply_edit(*sys.argv[1:4])
"""


@pytest.mark.parametrize("after", [4, 6])
def test_a_killed_command_leaves_no_model_and_can_be_run_again(after: int, tmp_path: Path) -> None:
    model = copy_as(base("llama"), tmp_path / "base", shards=True)
    edit = save_edit(model, names_of("llama"), tmp_path / "edit.safetensors")
    command = [str(edit), str(model), str(tmp_path / "on")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command, str(after)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    left = content(tmp_path / "on")
    assert len(left) == after
    assert ("config.json" in left) == (after == len(content(model)))
    if "config.json" not in left:
        with pytest.raises(ModelError, match=r"no config\.json"):
            Checkpoint.open(tmp_path / "on")
    (tmp_path / "on" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt beside what a killed command left"):
        apply_edit(*command)
    (tmp_path / "on" / "notes.txt").unlink()
    # Another model, in one file: nothing of the first one may stay beside it.
    whole = copy_as(base("llama"), tmp_path / "whole")
    apply_edit(str(edit), str(whole), str(tmp_path / "on"))
    assert content(tmp_path / "on").keys() == content(whole).keys()
    assert_equal_bytes(weights_of(tmp_path / "on"), applied(edit, model))
    assert {f.name for f in (tmp_path / "on" / ".pmet_edits").iterdir()} == {"edits.json"}
    with pytest.raises(OutputError, match="name a folder that is empty or does not exist"):
        apply_edit(*command)


def test_a_second_command_in_the_folder_stops_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = save_edit(base("gpt2"), names_of("gpt2"), tmp_path / "edit.safetensors")
    command = [str(edit), str(base("gpt2")), str(tmp_path / "on")]
    check = output_folder.check_claim

    def second(store: Store, token: str) -> None:
        monkeypatch.setattr(rewriting, "check_claim", check)
        apply_edit(*command)
        (tmp_path / "on" / ".pmet_edits" / "writing.json").write_text('{"token": "other"}')
        check(store, token)

    monkeypatch.setattr(rewriting, "check_claim", second)
    with pytest.raises(FolderBusyError, match="another command has begun to write to"):
        apply_edit(*command)


@pytest.mark.parametrize("force", [False, True])
def test_a_base_that_changes_while_it_is_read_is_noticed(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_as(base("gpt2"), tmp_path / "base")
    edit = save_edit(model, names_of("gpt2"), tmp_path / "edit.safetensors")
    taken = output_folder.claim

    def changed(store: Store, names: list[str]) -> str:
        data = bytearray((model / "model.safetensors").read_bytes())
        place = Checkpoint.open(model).tensors[names_of("gpt2")[0]].start
        data[place] ^= 1
        (model / "model.safetensors").write_bytes(data)
        return taken(store, names)

    monkeypatch.setattr(rewriting, "claim", changed)
    with pytest.raises(StorageError, match=r"weight of model .* changed while it was read; run"):
        apply_edit(str(edit), str(model), str(tmp_path / "on"), force=force)
    assert not (tmp_path / "on" / "config.json").exists()


def test_outputs_that_overlap_or_hold_something_are_refused(tmp_path: Path) -> None:
    model = copy_as(base("gpt2"), tmp_path / "models" / "base")
    edit = save_edit(model, names_of("gpt2"), tmp_path / "edits" / "edit.safetensors")
    for output, said in (
        (model, "model: .* is the --output"),
        (model / "on", "model: .* holds the --output"),
        (tmp_path / "models", "model: .* lies inside the --output"),
        (edit.parent, "edit: .* lies inside the --output"),
    ):
        with pytest.raises(JobError, match=said):
            apply_edit(str(edit), str(model), str(output))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"used holds mine\.txt; name a folder that is empty"):
        apply_edit(str(edit), str(model), str(tmp_path / "used"))
    with pytest.raises(OutputError, match="is a file; name a folder"):
        apply_edit(str(edit), str(model), str(tmp_path / "used" / "mine.txt"))
    (tmp_path / "empty").mkdir()
    apply_edit(str(edit), str(model), str(tmp_path / "empty"))


def test_models_that_the_edit_does_not_fit_are_refused(tmp_path: Path) -> None:
    edit = save_edit(base("llama"), names_of("llama"), tmp_path / "edit.safetensors")
    name = names_of("llama")[0]
    with pytest.raises(ModelError, match=rf"has no weight {name}.* another architecture"):
        apply_edit(str(edit), str(base("gpt2")), str(tmp_path / "on"), force=True)
    wide = Edit({name: torch.zeros(3, 5).double()}, {name: torch.zeros(3, 5)})
    wide.save(tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match=rf"has {name} as .* changes 3×5: .* another size"):
        apply_edit(str(tmp_path / "wide.safetensors"), str(base("llama")), str(tmp_path / "on"))
    apply_edit(str(edit), str(base("llama")), str(tmp_path / "on"))
    with pytest.raises(EditFileError, match=r"carries the edit .* already, as its record says"):
        apply_edit(str(edit), str(tmp_path / "on"), str(tmp_path / "twice"))


def test_a_hub_model_brings_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files asked from a hub include what `pmet apply` records beside a model."""
    from fnmatch import fnmatch

    asked: list[str] = []

    def download(model: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_model_folder("org/model", tmp_path)
    for name in (RECORD, ".pmet_edits/0123-4567.zst"):
        assert any(fnmatch(name, pattern) for pattern in asked)
