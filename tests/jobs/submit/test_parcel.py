"""Packing a job: what is uploaded, and what is refused because only this machine has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.submit.parcel import JOB_FILE, pack
from pipeline.errors import JobError
from pipeline.job.config import JobConfig, load_job


def job(**changes: Any) -> JobConfig:
    values: dict[str, Any] = {
        "model": "EleutherAI/gpt-j-6b",
        "requests": ("s3://facts/tonight/*.parquet",),
        "output": "s3://runs/tonight",
        "hparams": "gpt-j-6b",
        "second_moments": "gs://stats/gpt-j-6b",
    }
    return JobConfig.model_validate(values | changes)


@pytest.mark.parametrize("hparams", ["gpt-j-6b", "auto"])
def test_a_job_of_urls_travels_as_it_is(hparams: str, tmp_path: Path) -> None:
    parcel = pack(job(hparams=hparams))
    assert parcel.job == job(hparams=hparams)
    assert parcel.shared == []
    (tmp_path / JOB_FILE).write_bytes(parcel.files[JOB_FILE])
    assert load_job(tmp_path / JOB_FILE) == job(hparams=hparams)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "./models/base"),
        ("model", "models/gpt-j/base"),
        ("model", "models/base.gguf"),
        ("requests", ("facts/*.parquet",)),
        ("output", "runs/tonight"),
        ("output", "~/tonight"),
        ("output", "file://tonight"),
        ("corpus", ("s3://corpora/a.parquet", "corpora/b.parquet")),
        ("second_moments", "stats"),
        ("targets", {"store": "store"}),
        ("evaluate", {"store": "store"}),
        ("evaluate", {"harness": ["hellaswag", "tasks/own.yaml"]}),
    ],
)
def test_a_path_that_means_something_here_only_is_refused(key: str, value: Any) -> None:
    with pytest.raises(
        JobError, match=rf"^{key}.*is relative, so it differs between machines; give a "
    ):
        pack(job(**{key: value}))


def test_a_folder_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/base").mkdir(parents=True)
    with pytest.raises(JobError, match=rf"model: models/base .*{tmp_path}/models/base"):
        pack(job(model="models/base"))


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(JobError) as caught:
        pack(job(requests=("a.parquet", "b.parquet"), output="memory://run"))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["requests:", "requests:", "output:"]
    assert "the memory of one process" in lines[2]


def test_paths_that_all_nodes_have_to_share_are_named() -> None:
    parcel = pack(job(model="/nfs/base", output="file:///nfs/runs/1"))
    assert parcel.shared == [("model", "/nfs/base"), ("output", "file:///nfs/runs/1")]


def test_small_files_travel_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/hparams.json").write_text('{"layers": [3]}')
    Path("templates.json").write_text('[["{}"]]')
    parcel = pack(job(hparams="mine/hparams.json", context_templates="templates.json"))
    assert parcel.job.hparams == "hparams-hparams.json"
    assert parcel.files["hparams-hparams.json"] == b'{"layers": [3]}'
    assert parcel.files["context_templates-templates.json"] == b'[["{}"]]'
    assert parcel.shared == []
    assert b"mine/" not in parcel.files[JOB_FILE]


def test_a_large_file_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("templates.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(JobError, match="larger than 4 MiB; give a URL"):
        pack(job(context_templates="templates.json"))
