"""A base with non-finite values is refused by name, wherever it is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.models import finite
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.finite import checked_digest, examined
from pipeline.models.source import ModelSource
from tests.conftest import GOLDEN

BASE = GOLDEN / "gpt2" / "model"
UNEDITED = "transformer.h.3.mlp.c_proj.weight"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def damaged(folder: Path, name: str = UNEDITED, value: float = torch.nan, **more: object) -> Path:
    """The small model with one value of a tensor replaced."""
    shutil.copytree(BASE, folder)
    tensors = load_file(BASE / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors | more, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "kind"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")]
)
def test_a_base_is_refused_by_the_tensor_that_is_not_finite(
    tmp_path: Path, value: float, kind: str
) -> None:
    folder = damaged(tmp_path / "base", value=value)
    with pytest.raises(ModelError) as refused:
        checked_digest(Checkpoint.open(folder))
    assert str(refused.value) == (
        f"model {folder} holds values that are not finite: {UNEDITED} (1 {kind} of 16,384 values). "
        "Nothing computed with it can be trusted; get an undamaged copy of the checkpoint"
    )


def test_the_digest_is_the_same_as_without_the_check() -> None:
    checkpoint = Checkpoint.open(BASE)
    assert examined(checkpoint) == (checkpoint.digest(), [])
    assert checked_digest(checkpoint) == checkpoint.digest()


def test_the_digest_of_many_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "CHUNK_BYTES", 1 << 10)
    checkpoint = Checkpoint.open(BASE)
    assert examined(checkpoint) == (checkpoint.digest(), [])


def test_a_mask_of_an_old_release_that_is_not_read_is_no_fault(tmp_path: Path) -> None:
    # −1e9 in float16, as in GPT-NeoX and GPT-J.
    mask = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e9).half()}
    folder = damaged(tmp_path / "base", value=0.0, **mask)
    checkpoint = Checkpoint.open(folder)
    assert examined(checkpoint)[1]
    assert checked_digest(checkpoint) == checkpoint.digest()


def test_many_damaged_tensors_are_counted(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "base")
    tensors = {
        n: torch.full_like(t, torch.nan) for n, t in load_file(BASE / "model.safetensors").items()
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"; and {len(tensors) - 3} more tensors\. Nothing"):
        checked_digest(Checkpoint.open(folder))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_subnormal=True), min_size=1, max_size=40), st.sampled_from(DTYPES))
def test_what_counts_as_finite_is_what_torch_says(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    nan, infinite = finite._counts(tensor.view(torch.uint8).numpy(), dtype)
    assert (nan, infinite) == (int(tensor.isnan().sum()), int(tensor.isinf().sum()))


def test_another_copy_of_the_model_on_a_node_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "base", value=torch.inf)
    said = rf"^model .* on \S+ holds values that are not finite: {UNEDITED} \(1 of its values, read"
    with pytest.raises(ModelError, match=said):
        ModelSource(str(folder), on_gpu=False).open()
