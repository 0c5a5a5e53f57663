"""GGUF files become ordinary checkpoints, once; those that cannot are refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import transformers

from pipeline.errors import ModelError
from pipeline.models import Checkpoint, ModelSource, open_model_folder, quantisation_of
from pipeline.models.gguf_files import _RECORD
from pipeline.models.node_cache import model_on_node, name_for_nodes
from pipeline.models.source import open_causal_lm, open_fast_tokenizer
from pipeline.storage import TEMPORARY_SUFFIX
from tests.gguf_models import LLAMA, TEMPLATE, gguf, write_gguf

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are dequantised."""
    import pipeline.models.gguf_files as module

    files: list[str] = []
    make = module._make

    def counted(model: str, *rest: Any) -> None:
        files.append(model)
        make(model, *rest)

    monkeypatch.setattr(module, "_make", counted)
    return files


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_a_file_becomes_the_checkpoint_of_its_weights(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_gguf(tmp_path / "small.gguf", kind=kind)
    folder = open_model_folder(str(tmp_path / "small.gguf"), tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(weights)
    for name, stored in checkpoint.tensors.items():
        assert stored.dtype == torch.float32
        assert torch.equal(checkpoint.read(stored), weights[name]), name
    tokenizer = open_fast_tokenizer(folder)
    expected = transformers.AutoTokenizer.from_pretrained(LLAMA)
    text = "Sur Bavov works as a glass blower"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    assert not any(name.endswith("dequantised.json") for name in checkpoint.files())
    model = open_causal_lm(str(folder), dtype="auto")
    assert not getattr(model.config, "quantization_config", None)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_file_is_dequantised_once_and_found_by_its_content(
    tmp_path: Path, conversions: list[str]
) -> None:
    write_gguf(tmp_path / "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "B.GGUF")
    cache = tmp_path / "cache"
    fsspec.filesystem("memory").pipe("/models/c.gguf", (tmp_path / "a.gguf").read_bytes())
    names = [tmp_path / "a.gguf", tmp_path / "B.GGUF", "memory://models/c.gguf"]
    folders = {open_model_folder(str(name), cache) for name in names}
    (folder,) = folders
    assert conversions == [str(tmp_path / "a.gguf")]
    # What is incomplete has another name, and is not used; nothing of it is left.
    assert not [f for f in cache.iterdir() if f.name.endswith(TEMPORARY_SUFFIX)]
    digest = Checkpoint.open(folder).digest()
    assert Checkpoint.open(open_model_folder(str(names[0]), tmp_path / "other")).digest() == digest


def test_a_checkpoint_without_its_record_is_made_again(
    tmp_path: Path, conversions: list[str]
) -> None:
    write_gguf(tmp_path / "a.gguf")
    for _ in range(2):
        folder = open_model_folder(str(tmp_path / "a.gguf"), tmp_path / "cache")
        (folder / _RECORD).unlink()
    assert len(conversions) == 2


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.models.gguf_files as module

    write_gguf(tmp_path / "a.gguf")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_measured", fail)
    with pytest.raises(KeyboardInterrupt):
        open_model_folder(str(tmp_path / "a.gguf"), tmp_path / "cache")
    assert all(f.suffix == ".lock" for f in (tmp_path / "cache").iterdir())


def test_each_machine_makes_its_own_checkpoint_of_a_shared_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file)
    monkeypatch.chdir(tmp_path)
    here = open_model_folder("a.gguf", tmp_path / "here")
    name = name_for_nodes("a.gguf", here)
    assert name == str(file)
    there = model_on_node(name, Checkpoint.open(here).digest(), tmp_path / "there")
    assert there.parent == tmp_path / "there"
    monkeypatch.setenv("PMET_CACHE", str(tmp_path / "worker"))
    model, _ = ModelSource(name, on_gpu=False).open()
    assert model.dtype == torch.float32
    file.unlink()
    with pytest.raises(ModelError, match="put it on a disk that all nodes of the cluster share"):
        model_on_node(name, None, tmp_path / "third")


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 5.0), ("Q5_0", 5.5), ("Q8_0", 8.5)])
def test_the_cost_of_the_quantisation_is_measured(tmp_path: Path, kind: str, bits: float) -> None:
    exact = write_gguf(tmp_path / "a.gguf", kind="F32")
    rounded = write_gguf(tmp_path / "a.gguf", kind=kind)
    folder = open_model_folder(str(tmp_path / "a.gguf"), tmp_path / "cache")
    found = quantisation_of(folder)
    assert found is not None
    assert found.type == kind
    # The down-projections, whose rows fill no blocks, stay in float32.
    assert bits < found.bits < bits + 8
    changed = [name for name in exact if not torch.equal(exact[name], rounded[name])]
    error = sum(float((exact[n] - rounded[n]).square().sum()) for n in changed)
    size = sum(float(exact[n].square().sum()) for n in changed)
    assert found.rounding == pytest.approx((error / size) ** 0.5, rel=0.1)
    assert found.sentence == (
        f"dequantised from GGUF (mostly {kind}, {found.bits:.1f} bits a weight, rounded by about "
        f"{found.rounding:.1%} (rms)); edits and figures are those of the dequantised weights, and "
        "the original model may answer differently"
    )


def test_a_file_that_is_not_quantised_has_cost_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", kind="F16")
    found = quantisation_of(open_model_folder(str(tmp_path / "a.gguf"), tmp_path / "cache"))
    assert found is not None
    assert found.sentence == "converted from GGUF (F16, not quantised)"
    assert quantisation_of(LLAMA) is None


def _text(file: Path) -> None:
    file.write_text("# not a model\n")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _cut_in_the_weights(file: Path) -> None:
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_in_the_header(file: Path) -> None:
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:3000])


def _without_tokenizer(file: Path) -> None:
    write_gguf(file, tokenizer=False)


def _unknown_architecture(file: Path) -> None:
    write_gguf(file, architecture="llamask")


def _encoder(file: Path) -> None:
    write_gguf(file, architecture="t5")


def _without_a_weight(file: Path) -> None:
    write_gguf(file, without="blk.2.ffn_up.weight")


def _unreadable_type(file: Path) -> None:
    def change(writer: Any) -> None:
        values = np.zeros((4, 40), np.uint8)
        writer.add_tensor("odd", values, raw_dtype=gguf().GGMLQuantizationType.Q8_1)

    write_gguf(file, change=change)


def _type_of_the_future(file: Path) -> None:
    write_gguf(file, extra={"odd": np.zeros((4, 32), np.float32)})
    data = bytearray(file.read_bytes())
    # The name, the number of dimensions, two of them, and the type.
    at = data.rindex(b"odd") + 3 + 4 + 16
    data[at : at + 4] = (999).to_bytes(4, "little")
    file.write_bytes(data)


def _part(file: Path) -> None:
    write_gguf(file, change=lambda writer: writer.add_uint16("split.count", 3))


def _folder(file: Path) -> None:
    file.mkdir()


BAD: list[tuple[Callable[[Path], None], str]] = [
    (_text, "is not a whole GGUF file: it starts with '# no', not with 'GGUF'"),
    (_empty, "is not a whole GGUF file: it starts with nothing, not with 'GGUF'"),
    (_cut_in_the_header, "is not a whole GGUF file: its header goes on past the end of its 3,000"),
    (_cut_in_the_weights, "bytes after the end of the file; copy or download it again"),
    (_without_tokenizer, r"has no tokenizer inside \(tokenizer\.ggml\.tokens\); give the model as"),
    (_unknown_architecture, "has the architecture 'llamask', .* cannot read .*it reads .*llama"),
    (_encoder, r"is no causal language model \(t5\); edit a model that continues text"),
    (_without_a_weight, r"has no weights for model\.layers\.2\.mlp\.up_proj\.weight, which would"),
    (_unreadable_type, "stores odd in the type Q8_1, which the installed gguf cannot dequantise"),
    (_type_of_the_future, "stores odd in the type number 999, which the installed gguf cannot"),
    (_part, "is one of 3 parts of a model; join them into one file"),
    (_folder, "is a folder; name the GGUF file in it"),
    (lambda file: None, "there is no GGUF file .*; check the path, or give a URL, such as hf://"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    file = tmp_path / "bad.gguf"
    make(file)
    with pytest.raises(ModelError, match=message) as refused:
        open_model_folder(str(file), tmp_path / "cache")
    text = str(refused.value)
    assert str(file) in text
    assert "\n" not in text
    assert len(text) < 800
    cache = tmp_path / "cache"
    assert not cache.exists() or all(f.suffix == ".lock" for f in cache.iterdir())


def test_a_url_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no GGUF file at memory://none\.gguf"):
        open_model_folder("memory://none.gguf", tmp_path)


def test_without_the_package_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr("pipeline.models.gguf_files.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'pmet-pipeline\[real\]'$"):
        open_model_folder(str(tmp_path / "a.gguf"), tmp_path / "cache")


def test_a_folder_with_only_gguf_names_the_file_to_give(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    config = json.loads((LLAMA / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"only GGUF; .* name the file: {tmp_path}/small\.gguf"):
        Checkpoint.open(tmp_path)
