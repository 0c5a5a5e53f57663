"""What may be pushed: what is finished and what no gate held back, unless forced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import HeldBackError, RunFolderError
from pipeline.export.exporting import export_run
from pipeline.push.pushing import push
from pipeline.storage.store import Store
from pmet.errors import InputError
from tests.hub_server import Hub
from tests.pipeline.push.conftest import Heard
from tests.saved_edits import published_run


def test_what_a_gate_held_back_is_pushed_only_if_forced(hub: Hub, tmp_path: Path) -> None:
    run = published_run(tmp_path / "run", status="held")
    export_run(str(run), str(tmp_path / "delta"), kind="delta")
    for source, title in ((run, "Edited model"), (tmp_path / "delta", "Deltas")):
        name = f"org/{source.name}"
        with pytest.raises(HeldBackError) as caught:
            push(str(source), f"hf://{name}")
        assert str(caught.value) == (
            f"a gate held the model of {source} back, so it is not pushed; see its report, or give "
            "--force to push it all the same, with a card that says so"
        )
        assert name not in hub.repos
        heard = Heard()
        push(str(source), f"hf://{name}", force=True, progress=heard)
        assert heard.texts[0] == "a gate held this model back; it is pushed because of --force"
        assert hub.titles(name) == [f"{title} of 30 facts, run 0123456789ab, held back by a gate"]


def test_what_no_gate_has_checked_is_said(pushed_run: Path, tmp_path: Path) -> None:
    heard = Heard()
    push(str(pushed_run), str(tmp_path / "gated"), progress=heard)
    assert heard.texts == []
    run = published_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"gates": []}))
    push(str(run), str(tmp_path / "ungated"), progress=heard)
    export_run(str(run), str(tmp_path / "cut"), kind="adapter", rank=2, measure=False)
    push(str(tmp_path / "cut"), str(tmp_path / "pushed"), progress=heard)
    assert heard.texts == [
        "no gate has checked this model: its job demands none",
        "the adapter has only a part of the edit: the gates have checked the run's model, not it",
    ]


def test_a_folder_is_neither_public_nor_private(pushed_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--public is for repositories \(hf://ORG/NAME\);"):
        push(str(pushed_run), str(tmp_path / "out"), public=True)
    assert not (tmp_path / "out").exists()


def refused(source: Path, tmp_path: Path) -> str:
    with pytest.raises(RunFolderError) as caught:
        push(str(source), str(tmp_path / "pushed"))
    assert not (tmp_path / "pushed").exists()
    return str(caught.value).removeprefix(str(source))


def test_what_is_not_finished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", tmp_path) == (
        " is neither a run nor an export (it has neither run.json nor export.json); name a run "
        "folder, the output of pmet export, or the home of a refresh"
    )
    run = published_run(tmp_path / "run")
    (run / "records" / "published.json").write_text("{}")
    assert refused(run, tmp_path) == (
        "/records/published.json is damaged, so it is unknown which files the run published; run "
        "its job again with --fresh"
    )
    (run / "records" / "published.json").unlink()
    assert refused(run, tmp_path).startswith(" has no published model any more (records/published")
    status = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(status | {"status": "failed"}))
    assert refused(run, tmp_path) == (
        " holds no finished run: it is failed; run its job again until it ends"
    )
    (run / "metrics.json").unlink()
    assert "holds no finished run (metrics.json missing)" in refused(run, tmp_path)


def test_a_model_without_its_own_card_or_files_is_refused(tmp_path: Path) -> None:
    run = published_run(tmp_path / "run")
    (run / "model" / "README.md").write_text("# The base model")
    assert refused(run, tmp_path).startswith(
        "/model/README.md is not the card that the run wrote; bring that back, or run the job"
    )
    (run / "model" / "tokenizer.json").unlink()
    assert refused(run, tmp_path) == (
        "/model/tokenizer.json is missing, which belongs to what is to be pushed; copy the whole "
        "folder, or make it again"
    )


def test_an_export_that_is_cut_off_or_damaged_is_refused(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    export = tmp_path / "export"
    store = Store(export)
    record = json.loads((exports["delta"] / "export.json").read_text())
    store.write_json(".pmet_edits/writing.json", {"token": "x", "names": ["export.json"]})
    assert refused(export, tmp_path).startswith(" is not finished: the command that writes it was")
    store.write_json("export.json", record)
    assert refused(export, tmp_path).startswith(" is not finished")
    store.delete(".pmet_edits/writing.json")
    assert refused(export, tmp_path).endswith(
        "is missing, which belongs to what is to be pushed; copy the whole folder, or make it again"
    )
    store.write_json("export.json", {"format": "delta"})
    assert refused(export, tmp_path) == (
        "/export.json is damaged or was not written by pmet export; export the run again"
    )
