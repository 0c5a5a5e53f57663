"""Exports of an edit: opened with peft, applied, killed, and refused.

Scores that are measured again are in `tests.e2e.test_export`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.edits.rewriting import apply_edit, revert_edit
from pipeline.edits.saved import SavedEdit, SavedWeight
from pipeline.errors import FolderBusyError, JobError, ModelError, OutputError, RunFolderError
from pipeline.export import exporting
from pipeline.export.exporting import Exported, export_run
from pipeline.export.factors import targets_of
from pipeline.storage.store import Store
from pmet import EditFileError
from pmet.delta import Edit
from pmet.errors import InputError
from tests.saved_edits import base, content, copy_as, edited_run, names_of, weights_of

FAMILIES = ("gpt2", "llama")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with an edit of rank 6 in two layers, by family."""
    folder = tmp_path_factory.mktemp("runs")
    return {f: edited_run(folder / f, base(f), names_of(f)) for f in FAMILIES}


def adapter(run: Path, folder: Path, **options: Any) -> Exported:
    return export_run(str(run), str(folder), kind="adapter", measure=False, **options)


def model_at(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(5, 500).reshape(-1, 45)
    return model(input_ids=tokens).logits


def deltas(run: Path) -> dict[str, torch.Tensor]:
    return Edit.load(run / "delta").deltas


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_opens_an_adapter_that_is_the_published_model(
    family: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    record = adapter(runs[family], tmp_path / "adapter").record
    assert (record["exact"], record["rank"], record["facts"]) == (True, 6, 30)
    assert [w["full_rank"] for w in record["weights"]] == [6, 6]
    assert max(w["error"] for w in record["weights"]) < 1e-7
    plain, published = model_at(base(family)), model_at(runs[family] / "model")
    wanted = logits(published)
    assert (logits(plain) - wanted).abs().max() > 0.1
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert (logits(model) - wanted).abs().max() < 1e-4
    merged, ours = model.merge_and_unload().state_dict(), published.state_dict()
    assert merged.keys() == ours.keys()
    for name, weight in ours.items():
        if name in names_of(family):
            # Products and sums of float32.
            torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
        else:
            assert torch.equal(merged[name], weight)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(base(family))
    assert config.fan_in_fan_out == (family == "gpt2")
    assert config.lora_alpha == config.r == 6


def test_an_adapter_of_a_16_bit_model_is_the_published_one_to_its_rounding(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    model = copy_as(base("llama"), tmp_path / "base", torch.bfloat16)
    run = edited_run(tmp_path / "run", model, names_of("llama"))
    assert adapter(run, tmp_path / "adapter").record["exact"]
    opened = PeftModel.from_pretrained(model_at(model, torch.bfloat16), tmp_path / "adapter")
    merged, published = opened.merge_and_unload().state_dict(), weights_of(run / "model")
    for name in names_of("llama"):
        assert merged[name].dtype == torch.bfloat16
        # peft rounds B·A before it adds it, and the sum: each by half a unit in the last place.
        apart = (merged[name].float() - published[name].float()).abs()
        assert (apart <= 2.0**-7 * published[name].float().abs().clamp_min(0.1)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}])
def test_a_truncated_adapter_is_as_far_off_as_it_says(
    family: str, options: dict[str, Any], runs: dict[str, Path], tmp_path: Path
) -> None:
    record = adapter(runs[family], tmp_path / "adapter", **options).record
    assert not record["exact"]
    assert record["scores"]["adapter"] is None
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = deltas(runs[family])
    for weight in record["weights"]:
        name = weight["parameter"]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        left, right = held[f"{key}.lora_B.weight"], held[f"{key}.lora_A.weight"]
        # All weights have the largest rank; what one does not need is zero.
        assert left.shape[1] == right.shape[0] == record["rank"]
        assert not left[:, weight["rank"] :].any()
        assert not right[weight["rank"] :].any()
        delta = found[name].T if family == "gpt2" else found[name]
        apart = (left.double() @ right.double() - delta).norm() / delta.norm()
        assert apart.item() == pytest.approx(weight["error"], rel=1e-9)
        squares = torch.linalg.svdvals(delta).square()
        lost = squares[weight["rank"] :].sum() / squares.sum()
        assert weight["error"] == pytest.approx(lost.sqrt().item(), rel=1e-6)
        assert weight["energy"] == pytest.approx(1 - lost.item(), rel=1e-6)
        if "rank" in options:
            assert weight["rank"] == 2
        else:
            assert weight["energy"] >= 0.8 > 1 - squares[weight["rank"] - 1 :].sum() / squares.sum()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "**Not measured.** The adapter has only a part of the edit." in card


def test_weights_of_other_ranks_share_one(tmp_path: Path) -> None:
    names = names_of("gpt2")
    run = edited_run(tmp_path / "run", base("gpt2"), names[:1], rank=2)
    other = edited_run(tmp_path / "other", base("gpt2"), names[1:], rank=5)
    status = json.loads((run / "run.json").read_text())
    second = json.loads((other / "run.json").read_text())["layers"][0]
    (run / "delta" / "1.safetensors").write_bytes((other / second["file"]).read_bytes())
    status["layers"].append(second | {"file": "delta/1.safetensors"})
    (run / "run.json").write_text(json.dumps(status))
    record = adapter(run, tmp_path / "adapter").record
    assert ([w["rank"] for w in record["weights"]], record["rank"]) == ([2, 5], 5)
    applied = apply_edit(str(run), str(base("gpt2")), str(tmp_path / "model"))
    model = PeftModel.from_pretrained(model_at(base("gpt2")), tmp_path / "adapter")
    assert (logits(model) - logits(model_at(Path(applied.store.url)))).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_delta_applies_to_the_byte_and_comes_off(
    family: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    exported = export_run(str(runs[family]), str(tmp_path / "delta"), kind="delta")
    assert [f["name"] for f in exported.record["files"]] == [
        f"{name}.safetensors" for name in names_of(family)
    ]
    on = apply_edit(str(tmp_path / "delta"), str(base(family)), str(tmp_path / "on"))
    assert on.count("exact") == 2
    assert content(tmp_path / "on") == content(runs[family] / "model")
    off = revert_edit(str(tmp_path / "delta"), str(tmp_path / "on"), str(tmp_path / "off"))
    assert off.is_base
    assert content(tmp_path / "off") == content(base(family))
    # A copy of the base with another configuration is not the base.
    other = copy_as(base(family), tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("{", '{"note": 1,', 1))
    with pytest.raises(ModelError, match="is not the base of the run"):
        apply_edit(str(tmp_path / "delta"), str(other), str(tmp_path / "no"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cards_code_runs_as_written(
    family: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model_at(runs[family] / "model")
    for kind in ("delta", "adapter"):
        export_run(str(runs[family]), str(tmp_path / kind), kind=kind)
        card = (tmp_path / kind / "README.md").read_text()
        assert ModelCard(card).data.tags == ["knowledge-editing", "pmet"]
        for text in (f"\n{base(family)}\n", "30 facts", "PMET", "| efficacy | ", "95 % interval"):
            assert text in card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        monkeypatch.chdir(tmp_path / kind)
        names: dict[str, Any] = {}
        exec(code, names)
        if kind == "delta":
            for name, weight in wanted.named_parameters():
                assert torch.equal(names["model"].get_parameter(name), weight)
        assert (logits(names["model"].eval()) - logits(wanted)).abs().max() < 1e-4


def test_an_export_on_another_storage_has_the_same_bytes(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    remote = Store("memory://bucket/run")
    for file in runs["gpt2"].rglob("*"):
        if file.is_file():
            remote.write_bytes(str(file.relative_to(runs["gpt2"])), file.read_bytes())
    for kind in ("delta", "adapter"):
        here = export_run(str(runs["gpt2"]), str(tmp_path / kind), kind=kind).record
        there = export_run(remote.url, f"memory://bucket/{kind}", kind=kind).record
        assert here["files"] == there["files"]
    apply_edit("memory://bucket/delta", str(base("gpt2")), str(tmp_path / "on"))
    assert content(tmp_path / "on") == content(runs["gpt2"] / "model")


@pytest.mark.parametrize(
    ("kind", "last"), [("delta", "export.json"), ("adapter", "adapter_config.json")]
)
def test_a_killed_export_does_not_look_finished_and_is_written_again(
    kind: Any, last: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = str(runs["gpt2"]), tmp_path / "out"

    def killed(*_: Any, **__: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        written: list[str] = []
        write = Store.write_bytes

        def stop_before_last(self: Store, name: str, data: bytes) -> None:
            if name == last and self.url == str(output):
                killed()
            written.append(name)
            write(self, name, data)

        patch.setattr(Store, "write_bytes", stop_before_last)
        with pytest.raises(KeyboardInterrupt):
            export_run(run, str(output), kind=kind)
    assert not (output / last).exists()
    # Everything else is there.
    finished = export_run(run, str(tmp_path / "whole"), kind=kind).store
    assert {*finished.list()} - {last} <= {*Store(output).list()}
    if kind == "delta":
        with pytest.raises(EditFileError, match="is not finished: the command that writes it was"):
            apply_edit(str(output), str(base("gpt2")), str(tmp_path / "on"))
    (output / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"holds notes\.txt beside what a killed command left"):
        export_run(run, str(output), kind=kind)
    (output / "notes.txt").unlink()
    export_run(run, str(output), kind=kind)
    assert sorted(Store(output).list()) == sorted(finished.list())


def test_an_export_whose_folder_another_command_took_stops(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def taken(store: Store, *_: Any) -> str:
        store.write_json(".pmet_edits/writing.json", {"token": "other", "names": []})
        return "mine"

    monkeypatch.setattr(exporting, "claim", taken)
    with pytest.raises(FolderBusyError, match="another command has begun to write to"):
        adapter(runs["gpt2"], output)
    assert not (output / "adapter_config.json").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run, output = str(runs["gpt2"]), str(tmp_path / "out")
    for options, text in (
        ({"kind": "delta", "rank": 3}, "--rank, --energy and --no-measure are for --format"),
        ({"kind": "delta", "measure": False}, "are for --format adapter; a delta is always whole"),
        ({"rank": 3, "energy": 0.9}, "--rank and --energy both set the rank of the adapter; give"),
        ({"rank": 0}, "--rank is 0; give a rank of at least 1"),
        ({"energy": 1.5}, "--energy is 1.5; give a share above 0, at most 1, such as 0.99"),
        ({"energy": float("nan")}, "--energy is nan; give a share above 0"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            export_run(run, output, **{"kind": "adapter", **options})
    with pytest.raises(JobError, match=r"run: .* holds the --output"):
        adapter(runs["gpt2"], runs["gpt2"] / "adapter")
    with pytest.raises(RunFolderError, match=r"holds no finished run \(run\.json, metrics\.json"):
        adapter(base("gpt2"), tmp_path / "out")
    with pytest.raises(RunFolderError, match="holds no finished run: it is failed; run its job"):
        adapter(
            edited_run(tmp_path / "r", base("gpt2"), names_of("gpt2"), status="failed"),
            tmp_path / "out",
        )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"used holds notes\.txt; name a folder that is empty"):
        # Before anything of the run is read.
        adapter(tmp_path / "none", tmp_path / "used")
    assert not (tmp_path / "out").exists()


def test_weights_that_no_adapter_changes_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Module()
            self.experts.down_proj = nn.Parameter(torch.zeros(4, 2, 3))
            self.norm = nn.LayerNorm(3)
            self.norm.weight = nn.Parameter(torch.zeros(2, 3))

    def refused(name: str, *shape: int) -> str:
        weight = SavedWeight(Path("a"), name, shape, "")
        with pytest.raises(RunFolderError) as caught:
            targets_of(Experts(), SavedEdit("runs/a", {name: weight}, ""))
        return str(caught.value)

    assert refused("experts.down_proj", 4, 2, 3) == (
        "experts.down_proj in runs/a stacks the weights of experts, for which the releases of peft "
        "do not agree on one layout of an adapter; export with --format delta, or use the run's "
        "model"
    )
    assert refused("norm.weight", 2, 3) == (
        "norm.weight in runs/a is not the weight of a linear layer, and a LoRA adapter changes no "
        "other; export with --format delta, or use the run's model"
    )


def test_an_adapter_is_no_delta_and_damaged_exports_are_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises((EditFileError, RunFolderError)) as caught:
            apply_edit(str(folder), str(base("gpt2")), str(tmp_path / "on"))
        return str(caught.value)

    adapter(runs["gpt2"], tmp_path / "adapter")
    assert "holds an adapter, whose factors are rounded" in refused(tmp_path / "adapter")
    delta = tmp_path / "delta"
    exported = export_run(str(runs["gpt2"]), str(delta), kind="delta")
    file = delta / exported.record["files"][0]["name"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "is damaged: its SHA-256 is not the one in export.json; copy it again, or" in refused(
        delta
    )
    file.unlink()
    assert "is missing, which export.json names as part of the edit; copy the whole" in refused(
        delta
    )
    for text in ("{", "[]", '{"format": "delta"}'):
        (delta / "export.json").write_text(text)
        assert "export.json is damaged or was not written by pmet export" in refused(delta)
