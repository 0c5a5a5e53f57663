"""Edits: applied and undone exactly, in any process, and only on matching weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pmet.delta import Edit, EditWriter, delta_block, delta_rows, saved_delta
from pmet.errors import EditFileError, NotFiniteError

WEIGHT = "0.weight"


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5)).to(dtype)


def edit_for(held: nn.Module) -> Edit:
    weight = held.get_parameter(WEIGHT).detach().clone()
    # Changes of all sizes, so that adding and subtracting them would not restore the bits.
    delta = torch.randn(weight.shape, dtype=torch.float64) * torch.logspace(-9, 3, 7).double()
    return Edit({WEIGHT: delta}, {WEIGHT: weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_and_revert_are_exact(dtype: torch.dtype) -> None:
    held = model(dtype)
    before = held.get_parameter(WEIGHT).detach().clone()
    edit = edit_for(held)
    edit.apply(held)
    wanted = (before.double() + edit.deltas[WEIGHT]).to(dtype)
    assert torch.equal(held.get_parameter(WEIGHT), wanted)
    edit.revert(held)
    assert torch.equal(held.get_parameter(WEIGHT), before)


def test_a_saved_edit_undoes_in_another_process(tmp_path: Path) -> None:
    held = model()
    before = held.get_parameter(WEIGHT).detach().clone()
    edit = edit_for(held)
    edit.save(tmp_path / "edit.safetensors")
    Edit.load(tmp_path / "edit.safetensors").apply(held)
    assert not torch.equal(held.get_parameter(WEIGHT), before)
    Edit.load(tmp_path).revert(held)
    assert torch.equal(held.get_parameter(WEIGHT), before)


@pytest.mark.parametrize(
    ("dtype", "largest", "remedy"),
    [
        (torch.float16, "65504", ", or store the model in bfloat16 or float32"),
        (torch.bfloat16, "3.38953e+38", ""),
        (torch.float32, "3.40282e+38", ""),
    ],
)
def test_an_edit_that_its_dtype_cannot_hold_is_refused_and_leaves_the_model(
    dtype: torch.dtype, largest: str, remedy: str
) -> None:
    held = model(dtype)
    edit = edit_for(held)
    edit.deltas[WEIGHT][2, 3] = -1e39
    before = held.get_parameter(WEIGHT).detach().clone()
    with pytest.raises(NotFiniteError) as error:
        edit.apply(held)
    text, named = str(error.value), str(dtype).removeprefix("torch.")
    assert text.startswith(
        f"the edited weight of {WEIGHT} does not fit its dtype, {named}: the largest |W + Δ| is "
        f"1e+39, but {named} holds at most {largest}; ‖Δ‖/‖W‖ is "
    )
    assert text.endswith(f"Lower clamp_norm_factor or v_lr in the hyper-parameters{remedy}")
    assert torch.equal(held.get_parameter(WEIGHT), before)


def test_an_edit_of_float32_is_not_applied_to_a_float16_model_that_cannot_hold_it() -> None:
    held = model()
    edit = edit_for(held)
    edit.deltas[WEIGHT][0, 0] = 1e6
    edit.apply(held)
    edit.revert(held)
    half = model(torch.float16)
    edit.originals[WEIGHT] = half.get_parameter(WEIGHT).detach().float()
    with pytest.raises(NotFiniteError, match=r"its dtype, float16: the largest .* is 1e\+06"):
        edit.apply(half)
    assert half.get_parameter(WEIGHT).isfinite().all()


def test_a_ruined_model_of_an_older_release_can_be_reverted() -> None:
    held = model(torch.float16)
    before = held.get_parameter(WEIGHT).detach().clone()
    edit = edit_for(held)
    edit.deltas[WEIGHT][0, 0] = 1e6
    with torch.no_grad():
        held.get_parameter(WEIGHT).copy_((before.double() + edit.deltas[WEIGHT]).half())
    assert held.get_parameter(WEIGHT).isinf().any()
    edit.revert(held)
    assert torch.equal(held.get_parameter(WEIGHT), before)


def test_a_16_bit_checkpoint_opened_in_float32_is_the_same_model() -> None:
    edit = edit_for(model(torch.bfloat16))
    opened = model(torch.bfloat16).float()
    edit.apply(opened)
    edit.revert(opened)
    assert torch.equal(opened.get_parameter(WEIGHT), model(torch.bfloat16).float()[0].weight)


def test_an_edit_does_not_touch_another_model() -> None:
    held = model()
    edit = edit_for(held)
    with torch.no_grad():
        held.get_parameter(WEIGHT)[0, 0] += 1
    changed = held.get_parameter(WEIGHT).detach().clone()
    for action in (edit.apply, edit.revert):
        with pytest.raises(EditFileError, match="belongs to another model"):
            action(held)
    assert torch.equal(held.get_parameter(WEIGHT), changed)
    with pytest.raises(EditFileError, match=r"no parameter 0\.weight"):
        edit.apply(nn.Sequential(nn.Linear(5, 7)))


def test_applying_twice_is_refused() -> None:
    held = model()
    edit = edit_for(held)
    edit.apply(held)
    with pytest.raises(EditFileError, match="another edit has been applied on top"):
        edit.apply(held)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match="cannot be read"):
        Edit.load(tmp_path / "none.safetensors")
    with pytest.raises(EditFileError, match="holds no complete edit"):
        Edit.load(tmp_path)
    save_file({"delta.x": torch.zeros(1)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(EditFileError, match="not a saved edit"):
        Edit.load(tmp_path / "foreign.safetensors")
    edit_for(model()).save(tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    with pytest.raises(EditFileError, match="is the file complete"):
        Edit.load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_an_edit_written_in_pieces_is_the_file_of_a_whole_one(
    tmp_path: Path, dtype: torch.dtype, by: str
) -> None:
    edit = edit_for(model(dtype))
    delta, weight = edit.deltas[WEIGHT], edit.originals[WEIGHT]
    edit.save(tmp_path / "whole")
    with EditWriter(tmp_path / "pieces", WEIGHT, weight.shape, dtype) as writer:
        for values in weight.flatten().split(8):
            writer.add_original(values)
        for start in (2, 0, 4):  # in any order
            if by == "rows":
                writer.put_delta(delta[start : start + 2], top=start)
            else:
                writer.put_delta(delta[:, start : start + 2], left=start)
        writer.put_delta(delta[1:4, 6:], top=1, left=6)
        writer.put_delta(delta[[0, 4]][:1, 6:], top=0, left=6)
        writer.put_delta(delta[4:, 6:], top=4, left=6)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_of_a_saved_edit(tmp_path: Path) -> None:
    edit = edit_for(model())
    edit.save(tmp_path / "edit")
    parts = list(delta_rows(tmp_path / "edit", WEIGHT, range(1, 5), at_once=3))
    assert [len(part) for part in parts] == [3, 1]
    assert torch.equal(torch.cat(parts), edit.deltas[WEIGHT][1:5])
    (tmp_path / "cut").write_bytes((tmp_path / "edit").read_bytes()[:-1])
    with pytest.raises(EditFileError, match=r"cut cannot be read as a saved edit \(.+\); is the"):
        list(delta_rows(tmp_path / "cut", WEIGHT, range(5), at_once=3))
    assert torch.equal(
        delta_block(tmp_path / "edit", WEIGHT, (2, 3), top=1, left=2), edit.deltas[WEIGHT][1:3, 2:5]
    )
    with pytest.raises(EditFileError, match=r"cut cannot be read as a saved edit \(.+\); is the"):
        delta_block(tmp_path / "cut", WEIGHT, (1, 1))


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4)])
def test_experts_of_a_stacked_weight_are_written_and_read_one_by_one(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    delta, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape)
    delta[1] = 0
    Edit({WEIGHT: delta}, {WEIGHT: weight}).save(tmp_path / "whole")
    with EditWriter(tmp_path / "pieces", WEIGHT, weight.shape, weight.dtype) as writer:
        for values in weight.flatten().split(8):
            writer.add_original(values)
        for expert in (2, 0):  # the other one has no facts
            writer.put_delta(delta[expert], top=expert * shape[1])
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(saved_delta(tmp_path / "pieces", WEIGHT, 2), delta[2])
    assert torch.equal(saved_delta(tmp_path / "pieces", WEIGHT), delta)
    rows = range(2, 3 * shape[1] - 1)
    parts = list(delta_rows(tmp_path / "pieces", WEIGHT, rows, at_once=3))
    assert torch.equal(torch.cat(parts), delta.flatten(0, 1)[rows.start : rows.stop])
    block = delta_block(tmp_path / "pieces", WEIGHT, (2, 3), top=2 * shape[1] + 1, left=1)
    assert torch.equal(block, delta[2, 1:3, 1:4])
