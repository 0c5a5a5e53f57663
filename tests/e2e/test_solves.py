"""A job that solves for the layers more than once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import RunResult, run_job
from pipeline.stages import update
from pmet import Edit
from tests.conftest import GOLDEN
from tests.e2e.conftest import assert_same_weights, job
from tests.e2e.test_resume import Mortal, copied
from tests.e2e.test_run import folder, run_json, weights

SOLVES = 2


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    hparams = json.loads((GOLDEN / "gpt2" / "hparams.json").read_text())
    path = tmp_path_factory.mktemp("solves") / "hparams.json"
    path.write_text(json.dumps(hparams | {"solves": SOLVES, "spread": "linear"}))
    return {
        "hparams": str(path),
        "second_moments": str(GOLDEN / "gpt2" / "second_moments.safetensors"),
        "corpus": None,
        "evaluate": {"sample": 4},
    }


@pytest.fixture(scope="module")
def ran(
    changes: dict[str, Any], inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    return run_job(job(inputs, str(tmp_path_factory.mktemp("ran") / "out"), **changes))


class KilledLater(Mortal):
    fatal = (1, 1)


def journal(output: Path) -> list[str]:
    return (output / "journal").read_text().splitlines()


def test_each_layer_keeps_one_edit_against_the_base(ran: RunResult) -> None:
    reports = run_json(ran)["layers"]
    assert [report["solves"] for report in reports] == [SOLVES] * 3
    # One file a layer: those of the first turn are gone.
    assert set(ran.folder.list("delta")) == {report["file"] for report in reports}
    edit, published = Edit.load(folder(ran) / "delta"), weights(ran)
    for name, delta in edit.deltas.items():
        total = (edit.originals[name].double() + delta).to(published[name].dtype)
        assert (published[name] == total).all()


def test_a_rank_that_is_killed_in_a_later_turn_costs_that_step_only(
    ran: RunResult,
    changes: dict[str, Any],
    local_ray: None,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = copied(ran, tmp_path / "out", "layer-0", "layer-1", "layer-2")
    monkeypatch.setattr(update, "UpdateRank", KilledLater)
    on_ray = {"targets": {"workers": 1}, "update": {"ranks": 2}}
    again = run_job(job(inputs, str(output), **changes | on_ray))
    assert journal(output) == [
        *("edit 0", "edit 1", "edit 2", "edit 0", "edit 1"),
        *("redo 0", "redo 1", "redo 2", "edit 1", "edit 2"),
    ]
    assert_same_weights(weights(ran), weights(again))
    reports = run_json(again)["layers"]
    assert [report["solves"] for report in reports] == [SOLVES] * 3
    assert set(again.folder.list("delta", unfinished=True)) == {r["file"] for r in reports}


@pytest.mark.parametrize("lost", ["layer-0", "layer-1"])
def test_a_layer_that_is_lost_after_its_last_turn_is_not_mixed_with_the_others(
    lost: str,
    ran: RunResult,
    changes: dict[str, Any],
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = copied(ran, tmp_path / "out", lost)
    monkeypatch.setattr(update, "UpdateRank", KilledLater)
    again = run_job(job(inputs, str(output), **changes))
    assert journal(output) == [f"edit {index}" for index in (0, 1, 2, 0, 1, 2)]
    assert_same_weights(weights(ran), weights(again))
