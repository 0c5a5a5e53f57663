"""Submissions: their names, one at a time per run folder, and their exit statuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.submit.parcel import JOB_FILE, Parcel, pack
from jobs.submit.submission import (
    Submission,
    find,
    hint,
    public,
    stem_of,
    submissions,
    submit,
    wait,
)
from pipeline.errors import ClusterError, JobError
from pipeline.run_folder.folder import SUBMISSION, RunFolder
from tests.jobs.submit.test_parcel import job


@dataclass
class Server:
    """A fake job server that stores what is submitted."""

    address: str = "http://head:8265"
    kept: list[Any] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    unreachable: int = 0

    def jobs(self) -> list[Any]:
        if self.unreachable:
            self.unreachable -= 1
            raise ClusterError("no job server answers")
        return self.kept

    def find(self, name: str) -> Any | None:
        return next((j for j in self.jobs() if j.submission_id == name), None)

    def submit(
        self,
        name: str,
        entrypoint: str,
        *,
        folder: Path,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> bool:
        if self.find(name):
            return False
        self.files[name] = {f.name: f.read_bytes() for f in folder.iterdir()}
        self.kept.append(
            SimpleNamespace(
                submission_id=name,
                entrypoint=entrypoint,
                metadata=dict(metadata),
                environment=dict(environment),
                status="PENDING",
                driver_exit_code=None,
                message=None,
                start_time=1000 * len(self.kept),
            )
        )
        return True

    def end(self, status: str, code: int | None = None, message: str = "") -> None:
        self.kept[-1].status, self.kept[-1].driver_exit_code = status, code
        self.kept[-1].message = message


def send(parcel: Parcel, server: Server, **options: Any) -> tuple[str, bool]:
    return submit(parcel, server, **options)  # type: ignore[arg-type]


@pytest.fixture
def parcel(tmp_path: Path) -> Parcel:
    return pack(job(output=str(tmp_path / "Tonight's run")))


def test_a_job_that_runs_is_not_submitted_again(parcel: Parcel) -> None:
    server = Server()
    name, new = send(parcel, server)
    assert new
    assert name.startswith("pmet-tonight-s-run-")
    assert send(parcel, server) == (name, False)
    assert len(server.kept) == 1
    assert server.files[name] == parcel.files
    assert server.kept[0].environment[SUBMISSION] == name


def test_after_its_end_it_is_submitted_under_the_next_number(parcel: Parcel) -> None:
    server = Server()
    first, _ = send(parcel, server)
    server.end("FAILED", 1)
    second, new = send(parcel, server)
    assert new
    assert (first[-2:], second[-2:]) == ("-1", "-2")
    assert first[:-2] == second[:-2]


def test_a_cluster_that_has_forgotten_goes_on_counting_from_the_run_folder(parcel: Parcel) -> None:
    for _ in range(3):
        RunFolder(parcel.job.output).begin({}, seed=0)
    assert send(parcel, Server())[0].endswith("-4")


def test_another_job_is_not_taken_for_the_one_that_runs(parcel: Parcel) -> None:
    server = Server()
    send(parcel, server)
    other = pack(parcel.job.model_copy(update={"seed": 1}))
    with pytest.raises(JobError, match="with other settings; wait until it ends, stop it, or name"):
        send(other, server)
    with pytest.raises(JobError, match=r"stop that first .*--fresh"):
        send(parcel, server, fresh=True)
    server.end("STOPPED")
    assert send(other, server, fresh=True)[1]
    assert server.kept[-1].entrypoint.endswith("--fresh")


def test_folders_of_one_name_are_distinguished() -> None:
    assert stem_of("s3://a/out") != stem_of("s3://b/out")
    assert stem_of("s3://a/out/") == stem_of("s3://a/out")
    assert stem_of("out") == stem_of(str(Path("out").absolute()))
    assert stem_of("s3://a/???").startswith("pmet-run-")


def test_nothing_secret_is_in_what_anybody_may_read(parcel: Parcel) -> None:
    server = Server()
    send(pack(job(output="s3://key:hush@bucket/out?token=hush")), server)
    kept = server.kept[0]
    shown = f"{kept.submission_id} {kept.entrypoint} {kept.metadata} {kept.environment}"
    assert "hush" not in shown
    assert public("s3://key:hush@bucket/out?token=hush") == "s3://bucket/out"
    assert b"hush" in server.files[kept.submission_id][JOB_FILE]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", -9, 1),
        ("FAILED", 127, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
        ("RUNNING", None, None),
    ],
)
def test_exit_statuses_are_those_of_a_run(
    parcel: Parcel, status: str, code: int | None, expected: int | None
) -> None:
    server = Server()
    send(parcel, server)
    server.end(status, code)
    assert submissions(server.kept)[0].exit_status == expected


def test_jobs_of_others_are_not_ours() -> None:
    alien = SimpleNamespace(submission_id="raysubmit_1", metadata={})
    nameless = SimpleNamespace(submission_id=None, metadata=None)
    assert submissions([alien, nameless]) == []


def test_waiting_survives_a_cluster_that_is_out_of_reach_for_a_while(parcel: Parcel) -> None:
    server = Server()
    name, _ = send(parcel, server)
    server.end("FAILED", 3)
    server.unreachable = 1
    assert wait(server, name).exit_status == 3  # type: ignore[arg-type]
    server.unreachable = 9
    with pytest.raises(ClusterError, match="`pmet status RUN` reads its folder"):
        wait(server, name, patience_s=0)  # type: ignore[arg-type]


def test_a_name_that_the_cluster_has_forgotten_is_an_error_with_a_remedy(parcel: Parcel) -> None:
    with pytest.raises(ClusterError, match=r"has no record of pmet-x; .*pmet status RUN"):
        find(Server(), "pmet-x")  # type: ignore[arg-type]


def test_a_cluster_without_pmet_is_recognised(parcel: Parcel) -> None:
    server = Server()
    send(parcel, server)
    for message in ("/usr/bin/python3: No module named jobs", "/bin/sh: 1: python3: not found"):
        server.end("FAILED", 1, message)
        ours = Submission.of(server.kept[0])
        assert ours is not None
        assert "--python" in str(hint(ours))
    server.end("FAILED", 1, "pmet: a shard failed")
    ours = Submission.of(server.kept[0])
    assert ours is not None
    assert hint(ours) is None
