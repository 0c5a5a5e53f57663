"""The run folder: what counts as finished, and which job it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RunFolderError, StorageError
from pipeline.events import EventKind
from pipeline.run_folder.folder import RunFolder

DIGESTS = {"job": "1", "model": "a"}


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"


def begun(url: str, digests: dict[str, str] = DIGESTS, **options: bool) -> RunFolder:
    folder = RunFolder(url)
    folder.begin(digests, seed=0, **options)
    return folder


def test_records_outlive_the_process(url: str) -> None:
    folder = begun(url)
    assert folder.recorded("piece") is None
    folder.record("piece", {"rows": 3})
    again = RunFolder(url)
    assert again.begin(DIGESTS, seed=0) is True
    record = again.recorded("piece")
    assert record is not None
    assert record["rows"] == 3
    assert again.status["attempt"] == 2


def test_run_json_says_where_inputs_are_from(url: str) -> None:
    folder = RunFolder(url)
    folder.begin(DIGESTS, seed=0, origins={"hyper-parameters": "preset gpt-j-6b: its source"})
    said = folder.store.read_json("run.json")["origins"]
    assert said == {"hyper-parameters": "preset gpt-j-6b: its source"}


def test_what_earlier_attempts_took_is_kept(url: str) -> None:
    first = begun(url)
    with first.stage("targets"):
        pass
    for kind in (EventKind.DEATH, EventKind.RETRY, EventKind.DEATH):
        first.event(kind, "it happened")
    # The first attempt is killed, the second fails, the third finds everything done.
    second = begun(url)
    second.finish("failed", "no room")
    third = begun(url)
    killed, failed = third.status["earlier"]
    assert (killed["attempt"], killed["status"]) == (1, "killed")
    assert [stage["name"] for stage in killed["stages"]] == ["targets"]
    assert killed["events"] == {"death": 2, "retry": 1}
    assert (failed["attempt"], failed["status"], failed["error"]) == (2, "failed", "no room")
    assert begun(url, fresh=True).status["earlier"] == []
    for _ in range(22):
        last = begun(url)
    assert [attempt["attempt"] for attempt in last.status["earlier"]] == list(range(3, 23))


def test_a_record_counts_only_with_its_whole_file(url: str) -> None:
    folder = begun(url)
    folder.store.write_bytes("piece.bin", b"all of it")
    folder.record("piece", {"file": "piece.bin", "sha256": folder.store.sha256("piece.bin")})
    assert folder.recorded("piece")
    folder.store.write_bytes("piece.bin", b"all of")
    assert folder.recorded("piece") is None
    folder.store.delete("piece.bin")
    assert folder.recorded("piece") is None


def test_a_record_of_many_files_counts_only_with_all_of_them(url: str) -> None:
    folder = begun(url)
    for name in ("m/a", "m/b"):
        folder.store.write_bytes(name, name.encode())
    folder.record("piece", {"files": {n: folder.store.sha256(n) for n in ("m/a", "m/b")}})
    record = folder.recorded("piece")
    assert record is not None
    assert record["bytes"] == {"m/a": 3, "m/b": 3}
    folder.store.write_bytes("m/b", b"m/B")
    assert folder.recorded("piece") is None
    folder.store.delete("m/b")
    assert folder.recorded("piece") is None


def test_what_follows_is_forgotten(url: str) -> None:
    folder = begun(url)
    for name in ("layer-1", "layer-2", "layer-10"):
        folder.record(name, {})
    folder.forget("layer-1", "layer-2", "published")
    assert [folder.recorded(f"layer-{n}") is None for n in (1, 2, 10)] == [True, True, False]


def test_nothing_is_recorded_before_its_file_is_there(url: str) -> None:
    folder = begun(url)
    with pytest.raises(StorageError, match=r"cannot look for .*piece\.bin"):
        folder.record("piece", {"file": "piece.bin", "sha256": "0"})
    assert folder.recorded("piece") is None


def test_what_no_record_names_is_swept(url: str) -> None:
    folder, a, b, c = begun(url), "a" * 32, "b" * 32, "c" * 32
    named, users = f"targets/1-{b}.parquet", ["targets/.x.tmp", "targets/1-a.parquet"]
    for name in (f"targets/1-{a}.parquet", named, f"targets/.2-{c}.parquet.{c}.tmp", *users):
        folder.store.write_bytes(name, b"x")
    folder.sweep("targets", {named})
    assert folder.store.list("targets", unfinished=True) == [users[0], users[1], named]


def test_what_a_killed_attempt_was_writing_is_deleted(tmp_path: Path) -> None:
    folder = begun(str(tmp_path))
    writers = [folder.store.write_stream(n) for n in ("run.json", "records/p.json", "lease/1.json")]
    for writer in writers:
        writer.__enter__().write(b"half")
    assert len(list(tmp_path.rglob(".*.tmp"))) == 3
    begun(str(tmp_path))
    (left,) = tmp_path.rglob(".*.tmp")
    assert left.parent.name == "lease", "another run's"


def test_another_jobs_folder_is_refused_and_names_what_changed(url: str) -> None:
    begun(url).record("piece", {})
    with pytest.raises(RunFolderError, match=r"another job: model changed; .*--fresh"):
        begun(url, {**DIGESTS, "model": "b"})
    fresh = begun(url, {**DIGESTS, "model": "b"}, fresh=True)
    assert fresh.recorded("piece") is None


def test_a_record_of_another_job_does_not_count_even_without_its_status(url: str) -> None:
    folder = begun(url)
    folder.record("piece", {})
    folder.store.delete("run.json")
    assert begun(url, {**DIGESTS, "model": "b"}).recorded("piece") is None


def test_a_fresh_start_leaves_other_peoples_files(url: str) -> None:
    folder = begun(url)
    folder.store.write_bytes("notes.txt", b"mine")
    begun(url, fresh=True)
    assert folder.store.read_bytes("notes.txt") == b"mine"


def test_stages_events_and_the_end_are_reported(url: str) -> None:
    folder = begun(url)
    with folder.stage("targets") as detail:
        assert folder.store.read_json("run.json")["stage"] == "targets"
        detail["shards"] = 4
    folder.event(EventKind.RETRY, "shard 00007 failed", shard="00007", attempt=2)
    folder.finish("failed", "why")
    status = folder.store.read_json("run.json")
    assert status["status"] == "failed"
    assert status["error"] == "why"
    assert status["finished_at"] >= status["started_at"]
    assert status["events"] == [
        {"kind": "retry", "text": "shard 00007 failed", "shard": "00007", "attempt": 2}
    ]
    (stage,) = status["stages"]
    assert (stage["name"], stage["detail"]) == ("targets", {"shards": 4})


def test_what_happened_can_be_read_at_once(url: str) -> None:
    folder = begun(url)
    with folder.stage("targets", 4):
        folder.event(EventKind.DEATH, "worker 1 was lost")
        assert folder.store.read_json("run.json")["events"][0]["kind"] == "death"
