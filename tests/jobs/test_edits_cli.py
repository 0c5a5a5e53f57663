"""``pmet apply``, ``revert`` and ``push``: what they print, and their exit statuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from jobs.refresh.home import Home, path
from pipeline.run_folder.lease import Lease
from tests.hub_server import TOKEN, hub_server
from tests.jobs.conftest import Invoke
from tests.saved_edits import base, content, copy_as, edited_run, names_of, published_run, save_edit


def test_on_off_and_stacked(pmet: Invoke, tmp_path: Path) -> None:
    model = copy_as(base("gpt2"), tmp_path / "base", torch.bfloat16, shards=True)
    first, second = (
        save_edit(model, names_of("gpt2"), tmp_path / f"{n}.safetensors", seed=n) for n in range(2)
    )
    status, out, _ = pmet("apply", first, model, "--output", tmp_path / "one")
    assert (status, out.splitlines()) == (
        0,
        [
            "2 tensors in 1 file changed; everything else is copied byte for byte",
            "exact: 2 tensors held the values that the edit was made for, and now W + Δ",
            "pmet revert restores every byte as long as this edit is the last one applied",
            "the model carries 1 edit:",
            f"  {first}",
            str(tmp_path / "one"),
        ],
    )
    status, out, _ = pmet("apply", second, tmp_path / "one", "--output", tmp_path / "two")
    assert status == 0
    assert "stacked: Δ was added to 2 tensors that other edits of the same base had changed" in out
    # The first comes off to the byte while the second can be read; then only to rounding.
    status, out, _ = pmet("revert", first, tmp_path / "two", "--output", tmp_path / "second")
    assert status == 0
    assert "exact: 2 tensors restored to the byte, as the other edits alone leave it" in out
    moved = second.rename(tmp_path / "moved.safetensors")
    status, out, err = pmet("revert", first, tmp_path / "two", "--output", tmp_path / "rounded")
    assert status == 0
    assert "to rounding: Δ was subtracted from 2 tensors, in float64 and rounded once; up to" in out
    assert "may differ from their former values, by about 0.0" in out
    assert f"warning: the edit {second}, applied later, cannot be read again" in " ".join(
        err.split()
    )
    for place in ("second", "rounded"):
        off = tmp_path / f"off-{place}"
        status, out, _ = pmet("revert", moved, tmp_path / place, "--output", off)
        assert status == 0
        assert "exact: 2 tensors restored to the byte, as before the edit" in out
        assert "the model carries" not in out
        assert content(off) == content(model)


def test_another_base_is_refused_and_forced(pmet: Invoke, tmp_path: Path) -> None:
    model = copy_as(base("gpt2"), tmp_path / "base")
    edit = save_edit(model, names_of("gpt2"), tmp_path / "edit.safetensors")
    other = copy_as(base("gpt2"), tmp_path / "other", torch.bfloat16)
    name = names_of("gpt2")[0]
    status, out, err = pmet("apply", edit, other, "--output", tmp_path / "on")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"pmet: model {other} stores {name} as bfloat16, which cannot hold the values that the "
        "edit was made for; apply the edit to its own base, or give --force to add Δ to what is "
        "there, in float64 and rounded once, which nothing has measured"
    )
    assert not (tmp_path / "on").exists()
    status, out, _ = pmet("apply", edit, other, "--output", tmp_path / "on", "--force")
    assert status == 0
    assert (
        "forced: Δ was added to 2 tensors that the edit was not made for, in float64 and rounded "
        "once; nothing has measured the result" in out
    )
    status, out, err = pmet("revert", edit, model, "--output", tmp_path / "off")
    assert status == 2
    assert f"{name} holds the values that the edit was made for, before any change" in err
    status, out, _ = pmet("revert", edit, model, "--output", tmp_path / "off", "--force")
    assert status == 0
    assert "forced: Δ was subtracted from 2 tensors that did not hold it, in float64" in out


def test_wrong_inputs_are_one_clear_line(pmet: Invoke, tmp_path: Path) -> None:
    edit = save_edit(base("gpt2"), names_of("gpt2"), tmp_path / "edit.safetensors")
    for arguments, said in (
        ((tmp_path / "none", base("gpt2")), "is neither a run nor a saved edit (nothing there)"),
        ((edit, tmp_path / "none"), "is not a folder; give a model folder, a GGUF file, a URL"),
        ((edit, base("llama")), "is of a model of another architecture"),
    ):
        for command in ("apply", "revert"):
            status, out, err = pmet(command, *arguments, "--output", tmp_path / "new")
            assert (status, out) == (2, "")
            assert said in err.splitlines()[-1]
            assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_an_edit_alone(pmet: Invoke, tmp_path: Path) -> None:
    run = edited_run(tmp_path / "run", base("llama"), names_of("llama"))
    status, out, err = pmet("export", run, "--format", "delta", "--output", tmp_path / "delta")
    assert (status, out.splitlines()) == (
        0,
        ["0.3 MB in 2 files", "2 changed weights of 30 facts", str(tmp_path / "delta")],
    ), err
    status, out, err = pmet("export", run, "--format", "adapter", "--output", tmp_path / "exact")
    assert status == 0, err
    assert "exact: an adapter of rank 6 with all of 30 facts; B·A differs from Δ by" in out
    assert "e-08 of its size at most, which is rounding, so the run's scores hold" in out
    assert re.search(r"model\.layers\.0\.mlp\.down_proj\.weight │ 6 +│ 6 +│ 100 %", out)
    arguments = ("export", run, "--format", "adapter", "--rank", 2, "--output", tmp_path / "few")
    status, out, err = pmet(*arguments, "--no-measure")
    assert status == 0, err
    assert "truncated: an adapter of rank 2; B·A differs from Δ by" in out
    assert "its scores were not measured, and the run's do not hold for it" in out
    status, out, err = pmet(*arguments[:-1], tmp_path / "again")
    assert (status, out) == (2, "")
    assert "the scores of the truncated edit cannot be measured: " in err
    assert err.splitlines()[-1].endswith("or give --no-measure")
    assert not (tmp_path / "again").exists()


def test_an_export_says_what_a_run_is_worth(pmet: Invoke, tmp_path: Path) -> None:
    names = names_of("gpt2")
    run = edited_run(tmp_path / "run", base("gpt2"), names, rank=None, status="held")
    status, _, err = pmet("export", run, "--format", "adapter", "--output", tmp_path / "out")
    assert status == 0
    said = " ".join(err.split())
    assert "warning: a gate held the edited model of" in said
    assert "factors of rank 64 hold 1.2 times as many numbers as the weights that they" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**A gate held the edited model back.**" in card


def test_a_push_says_what_and_where_and_never_the_token(
    pmet: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = published_run(tmp_path / "run")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = []
    with hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for done in ("pushed", "nothing to do, all of it is there"):
            status, out, err = pmet("push", run, "hf://org/capitals")
            said += [out, err]
            assert (status, out.splitlines()) == (
                0,
                [
                    "Edited model of 30 facts, run 0123456789ab",
                    f"{done}: 6 files, 1.3 MB",
                    f"{hub.url}/org/capitals/tree/main",
                ],
            )
        hub.refuse = lambda _: (401, "Invalid credentials in Authorization header")
        status, out, err = pmet("push", run, "hf://org/capitals")
        assert status == 2
        assert err.splitlines()[-1].startswith(
            f"pmet: {hub.url} does not accept the token in HF_TOKEN (401: "
        )
        hub.refuse = lambda _: (503, "")
        status, out, last = pmet("push", run, "hf://org/capitals")
        assert status == 1
        assert last.splitlines()[-1].startswith(f"pmet: {hub.url} is not available (503); push")
    assert TOKEN not in "".join([*said, err, last])


def test_a_model_that_a_gate_held_back_stays_here(pmet: Invoke, tmp_path: Path) -> None:
    run = published_run(tmp_path / "run", status="held")
    status, out, err = pmet("push", run, tmp_path / "out")
    assert (status, out) == (3, "")
    assert err.startswith(f"pmet: a gate held the model of {run} back, so it is not pushed; see")
    assert not (tmp_path / "out").exists()
    status, out, err = pmet("push", run, tmp_path / "out", "--force")
    assert (status, "held back by a gate" in out) == (0, True)


def test_the_model_in_use_of_a_refresh_is_pushed(pmet: Invoke, tmp_path: Path) -> None:
    home = Home(str(tmp_path / "home"))
    Lease.acquire(home.store).release()
    for version in (1, 2):
        published_run(tmp_path / "home" / path(version))
        home.promote(version, expected=version - 1, by="refresh")
    home.promote(1, expected=2, by="rollback")
    for number, place in enumerate(("home", "home/CURRENT")):
        status, _, err = pmet("push", tmp_path / place, tmp_path / f"out{number}")
        assert status == 0, err
    wanted = (tmp_path / "home" / path(1, "model", "README.md")).read_bytes()
    assert (tmp_path / "out0" / "README.md").read_bytes() == wanted
    # A version without facts to edit is the base model: there is no run.
    (tmp_path / "home" / path(1, "run.json")).unlink()
    status, _, err = pmet("push", tmp_path / "home", tmp_path / "out2")
    assert (status, err) == (
        2,
        f"pmet: version 1, which is in use at {tmp_path / 'home'}, is the base model: its refresh "
        "found no facts to edit, and there is no run to push\n",
    )


def test_a_home_without_a_promotion_has_nothing_to_push(pmet: Invoke, tmp_path: Path) -> None:
    published_run(tmp_path / "home" / path(1))
    status, _, err = pmet("push", tmp_path / "home", tmp_path / "out")
    assert (status, err) == (2, f"pmet: no version in {tmp_path / 'home'} has been promoted yet\n")
