"""Whatever the layout of inputs and output, a run changes no file that it did not create."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cli import main
from tests.conftest import GOLDEN
from tests.e2e.conftest import facts
from tests.jobs.conftest import process_restored

GPT2 = GOLDEN / "gpt2"
EXAMPLES = int(os.environ.get("PMET_FUZZ", "8"))

MODELS = st.sampled_from(["base", "out/model", "out/versions/base", "facts/model"])
REQUESTS = st.sampled_from(
    ["facts/r.parquet", "out/r.parquet", "out/targets/r.parquet", "base/r.parquet", "facts"]
)
OUTPUTS = st.sampled_from(["out", "out", "base", "base/run", "facts/run", "out/model", "."])
SPELLINGS = st.sampled_from(["path", "url", "link", "dots"])
USERS = st.sets(
    st.sampled_from(
        ["out/report.html", "out/job.yaml", "out/model/notes.txt", "out/delta/x", "out/run.json"]
    ),
    max_size=2,
)


def spelled(root: Path, place: str, how: str) -> str:
    """Return one of several names for a place."""
    path = root / place
    match how:
        case "url":
            return f"file://{path}"
        case "dots":
            return f"{root}/./nowhere/../{place}"
        case "link":
            link = root / f"link-{place.replace('/', '-')}"
            if not link.is_symlink():
                link.symlink_to(path, target_is_directory=True)
            return str(link)
    return str(path)


def lay_out(root: Path, model: str, requests: str, users: set[str]) -> None:
    shutil.copytree(GPT2 / "model", root / model)
    weights = root / model / "model.safetensors"
    shutil.copy(weights, weights.with_name("model_backup.safetensors"))
    table = root / (requests if requests.endswith(".parquet") else f"{requests}/r.parquet")
    table.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(facts()[:2]), table)
    hparams = json.loads((GPT2 / "hparams.json").read_text())
    (root / "hp.json").write_text(json.dumps(hparams | {"v_num_grad_steps": 2}))
    for name in users:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def digests(root: Path) -> dict[str, str]:
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if not any(parent.is_symlink() for parent in p.parents)
    }


def without_leases(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith("lease/")}


def pmet(arguments: list[str]) -> int:
    """Run a command in this process; return its exit status."""
    with pytest.MonkeyPatch.context() as patch, process_restored():
        patch.setattr("sys.argv", ["pmet", *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def job_of(root: Path, model: str, requests: str, output: str) -> Path:
    job = {
        "model": model,
        "requests": requests,
        "output": output,
        "hparams": str(root / "hp.json"),
        "second_moments": str(GPT2 / "second_moments.safetensors"),
        "context_templates": str(GPT2 / "context_templates.json"),
        "targets": {"workers": 0},
        "update": {"ranks": 0},
    }
    path = root / "the-job.yaml"
    path.write_text(json.dumps(job))
    return path


@pytest.mark.timeout(max(600, 30 * EXAMPLES))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(MODELS, REQUESTS, OUTPUTS, SPELLINGS, SPELLINGS, USERS)
def test_no_file_of_the_users_is_changed(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    requests: str,
    output: str,
    how_model: str,
    how_output: str,
    users: set[str],
) -> None:
    root = tmp_path_factory.mktemp("layout")
    lay_out(root, model, requests, users)
    job = job_of(
        root,
        spelled(root, model, how_model),
        str(root / requests),
        spelled(root, output, how_output),
    )
    before = digests(root)
    for arguments in (["run", str(job)], ["run", str(job), "--fresh"]):
        status = pmet(arguments)
        after = digests(root)
        assert {name: after.get(name) for name in before} == before
        if status:
            assert status == 2
            assert set(after) == set(before), "a refusal writes nothing"
        else:
            assert (root / output / "model" / "config.json").is_file()


def test_the_layout_of_a_published_run_is_no_base_for_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path, "base", "facts/r.parquet", set())
    first = job_of(tmp_path, str(tmp_path / "base"), str(tmp_path / "facts"), str(tmp_path / "x"))
    assert pmet(["run", str(first)]) == 0
    (tmp_path / "x" / "model" / "notes.txt").write_text("mine")
    (tmp_path / "x" / "delta" / "notes.txt").write_text("mine")
    before = digests(tmp_path / "x")
    chained = job_of(
        tmp_path, str(tmp_path / "x" / "model"), str(tmp_path / "facts"), str(tmp_path / "x")
    )
    capfd.readouterr()
    assert pmet(["run", str(chained), "--fresh"]) == 2
    assert "x/model lies inside the output" in " ".join(capfd.readouterr().err.split())
    assert digests(tmp_path / "x") == before
    # Starting over in the run's own folder is refused because of the notes, and changes nothing.
    first = job_of(tmp_path, str(tmp_path / "base"), str(tmp_path / "facts"), str(tmp_path / "x"))
    assert pmet(["run", str(first), "--fresh"]) == 2
    assert "holds model/notes.txt" in " ".join(capfd.readouterr().err.split())
    assert without_leases(digests(tmp_path / "x")) == without_leases(before)
    (tmp_path / "x" / "model" / "notes.txt").unlink()
    assert pmet(["run", str(first), "--fresh"]) == 0
    assert (tmp_path / "x" / "delta" / "notes.txt").read_text() == "mine"
