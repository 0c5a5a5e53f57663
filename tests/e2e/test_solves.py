"""A job that solves for the layers more than once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.rank_group import Rendezvous
from pipeline.run import RunResult, run_job
from pipeline.stages import update
from pipeline.zero.rank import UpdateJob, UpdateRank
from pmet import Edit
from tests.conftest import GOLDEN
from tests.e2e.conftest import assert_same_weights, job
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


class Logged(UpdateRank):
    """A rank that writes down what it does, and is killed once in its second turn."""

    def __init__(self, meeting: Rendezvous, job: UpdateJob) -> None:
        super().__init__(meeting, job)
        self._journal = Path(str(job.run.local_path("journal")))
        self._turn = 0

    def edit_layer(self, index: int, *held: Any) -> Any:
        self._turn, self._index = (1 if held[0] else 0), index
        self._write(f"edit {index}")
        return super().edit_layer(index, *held)

    def redo_layer(self, index: int, file: str) -> None:
        self._write(f"redo {index}")
        super().redo_layer(index, file)

    def _write(self, line: str) -> None:
        if self._rank == 0:
            with self._journal.open("a") as journal:
                journal.write(f"{line}\n")

    def _change(self, *args: Any) -> Any:
        marker = self._journal.with_name("killed")
        if self._rank == 1 and (self._turn, self._index) == (1, 1) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._change(*args)


def without(ran: RunResult, output: Path, *names: str) -> Path:
    """A finished run as if some of its work had not been done yet."""
    shutil.copytree(folder(ran), output)
    for name in names:
        (output / "records" / f"{name}.json").unlink()
    return output


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
    output = without(ran, tmp_path / "out", "layer-0", "layer-1", "layer-2")
    monkeypatch.setattr(update, "UpdateRank", Logged)
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
    output = without(ran, tmp_path / "out", lost)
    monkeypatch.setattr(update, "UpdateRank", Logged)
    again = run_job(job(inputs, str(output), **changes))
    assert journal(output) == [f"edit {index}" for index in (0, 1, 2, 0, 1, 2)]
    assert_same_weights(weights(ran), weights(again))
