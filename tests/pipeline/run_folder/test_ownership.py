"""The user's files stay, whatever a run deletes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import RunFolderError, StorageError
from pipeline.run_folder.folder import RunFolder
from pipeline.run_folder.lease import Lease
from pipeline.run_folder.ownership import (
    files_made,
    made,
    refuse_foreign_folder,
    refuse_foreign_in_model,
)
from pipeline.storage.store import Store

TOKEN = "0123456789abcdef" * 2
OWN = (
    "run.json",
    "job.yaml",
    "records/published.json",
    f"targets/00000-{TOKEN}.parquet",
    f"delta/transformer.h.3.mlp.c_proj.weight-{TOKEN}.safetensors",
    "second_moments/second_moments.safetensors",
    f"second_moments/second_moments.parts/{TOKEN[:16]}-16/00001-3-{TOKEN}.safetensors",
    f"second_moments/factors/transformer.h.3.mlp.fc_out-{TOKEN}.safetensors",
)
USERS = (
    "mine.txt",
    "targets/facts.parquet",
    "targets/facts-2026.parquet",
    f"targets/notes/00000-{TOKEN}.parquet",
    "delta/mine.txt",
    "records/mine.txt",
    "second_moments/second_moments.parts/mine.safetensors",
    "second_moments/README.md",
    f"inputs/00000-{TOKEN}.parquet",
)


def run_folder(url: str, **options: bool) -> RunFolder:
    folder = RunFolder(url)
    folder.begin({"job": "1"}, seed=0, **options)
    return folder


def test_the_files_of_runs_are_distinguished_from_others() -> None:
    assert list(made([*OWN, *USERS])) == list(OWN)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_starting_over_deletes_what_runs_made_and_nothing_else(where: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run") if where == "local" else f"memory://{tmp_path.name}/run"
    folder = run_folder(url)
    for name in {*OWN, *USERS} - {"run.json", "records/published.json"}:
        folder.store.write_bytes(name, name.encode())
    folder.clear_model(["config.json", "model.safetensors"])
    folder.store.write_bytes("model/config.json", b"{}")
    folder.store.write_bytes("model/README.md", b"card")
    assert set(OWN) - {"records/published.json"} <= set(files_made(folder.store))
    run_folder(url, fresh=True)
    left = set(folder.store.list())
    assert left == {*USERS, "run.json"}
    assert all(folder.store.read_bytes(name) == name.encode() for name in USERS)
    if where == "local":
        assert not (tmp_path / "run" / "model").exists(), "empty folders go, too"


def test_publishing_again_replaces_only_what_was_published(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path))
    folder.clear_model(["config.json", "old.json"])
    for name in ("config.json", "old.json"):
        folder.store.write_bytes(f"model/{name}", b"1")
    # It dies here, and is resumed with another base.
    folder.clear_model(["config.json", "new.json"])
    assert folder.store.list("model") == []
    folder.store.write_bytes("model/adapter_config.json", b"{}")
    with pytest.raises(
        RunFolderError, match=r"model holds model/adapter_config.json, which no run"
    ):
        folder.clear_model(["config.json"])
    assert folder.store.exists("model/adapter_config.json")


def test_a_file_in_the_place_of_the_model_stops_a_run_at_its_beginning(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path))
    folder.store.write_bytes("model/config.json", b"mine")
    with pytest.raises(RunFolderError, match="move it elsewhere"):
        run_folder(str(tmp_path))
    with pytest.raises(RunFolderError, match="move it elsewhere"):
        run_folder(str(tmp_path), fresh=True)
    assert (tmp_path / "model" / "config.json").read_bytes() == b"mine"


def test_notes_beside_a_published_model_do_not_stop_the_same_job(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path))
    folder.clear_model(["config.json"])
    folder.store.write_bytes("model/config.json", b"{}")
    folder.record(
        "published", {"files": {"model/config.json": folder.store.sha256("model/config.json")}}
    )
    folder.store.write_bytes("model/notes.txt", b"mine")
    assert run_folder(str(tmp_path)).recorded("published")
    with pytest.raises(RunFolderError, match=r"notes\.txt"):
        refuse_foreign_in_model(folder.store)


@pytest.mark.parametrize(
    "name", ["report.html", "job.yaml", "model/x.txt", "facts.parquet", ".env"]
)
def test_a_folder_with_files_that_is_no_run_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(RunFolderError, match=r"is not a run folder .* empty or does not exist"):
        refuse_foreign_folder(Store(tmp_path))


def test_new_empty_and_own_folders_are_taken(tmp_path: Path) -> None:
    refuse_foreign_folder(Store(tmp_path / "new"))
    refuse_foreign_folder(Store(tmp_path))
    refuse_foreign_folder(Store(f"memory://{tmp_path.name}/new"))
    with Lease.acquire(Store(tmp_path)):
        # A run was killed right after it had acquired the lease.
        refuse_foreign_folder(Store(tmp_path))
        (tmp_path / "facts.parquet").write_text("mine")
        with pytest.raises(RunFolderError, match=r"holds facts\.parquet"):
            refuse_foreign_folder(Store(tmp_path))
        refuse_foreign_folder(Store(tmp_path), beside=("facts.parquet",))
    run_folder(str(tmp_path))
    refuse_foreign_folder(Store(tmp_path))


def test_a_foreign_folder_named_lease_is_not_a_lease(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "contract.pdf").write_text("mine")
    with pytest.raises(RunFolderError, match="holds lease and is not"):
        refuse_foreign_folder(Store(tmp_path))


@pytest.mark.parametrize("status", ["{}", '{"digests": {}}', "[1]", "not json", '{"status": "ok"}'])
def test_a_run_json_of_another_program_is_no_record(status: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(status)
    with pytest.raises(RunFolderError, match=r"run\.json (was not written by|is damaged).*output"):
        refuse_foreign_folder(Store(tmp_path))
    assert (tmp_path / "run.json").read_text() == status


def test_an_output_below_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for output in ("link", "link/run"):
        with pytest.raises(RunFolderError, match=r"link is a link to .*gone, which does not exist"):
            refuse_foreign_folder(Store(tmp_path / output))


def test_a_file_and_links_in_the_place_of_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):
        refuse_foreign_folder(Store(tmp_path / "file"))
    run_folder(str(tmp_path / "run"))
    (tmp_path / "base").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "base")
    with pytest.raises(RunFolderError, match=r"run/model is a link"):
        refuse_foreign_folder(Store(tmp_path / "run"))


PATHS = st.lists(
    st.sampled_from(["model", "delta", "targets", "records", "lease", "x", "second_moments"]),
    max_size=2,
)
FILES = st.sampled_from(
    ["a.txt", "config.json", "run.json", "000001.json", f"00000-{TOKEN}.parquet", "report.html"]
)


@settings(deadline=None)
@given(
    files=st.lists(st.tuples(PATHS, FILES), max_size=5),
    fresh=st.booleans(),
    publishes=st.booleans(),
)
@example(files=[(["lease"], "000001.json")], fresh=True, publishes=True)
def test_no_file_that_was_there_first_is_ever_changed(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[list[str], str]],
    fresh: bool,
    publishes: bool,
) -> None:
    root = tmp_path_factory.mktemp("run")
    for folders, name in files:
        path = root.joinpath(*folders, name)
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine {name}")
    before = digests(root)
    try:
        refuse_foreign_folder(Store(root))
        with Lease.acquire(Store(root)) as lease:
            folder = RunFolder(str(root), lease.check)
            folder.begin({"job": "1"}, seed=0, fresh=fresh)
            if publishes:
                folder.clear_model(["config.json"])
            folder.sweep("targets", ())
    except RunFolderError:
        pass
    except StorageError as error:
        # A file in the place of a lease that is none.
        if "lease/000001.json is not JSON" not in str(error):
            raise
    after = digests(root)
    assert {name: after.get(name) for name in before} == before


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_status_says_whose_it_is(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path))
    status: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
    assert "pmet-pipeline" in status["versions"]
    assert folder.status["digests"] == {"job": "1"}
