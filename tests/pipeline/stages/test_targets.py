"""The targets stage: what is found, recorded and reused, and which requests are isolated."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from pipeline.cluster.pool import Pool, SerialPool
from pipeline.cluster.session import ray_session
from pipeline.cluster.tasks import Task
from pipeline.cluster.worker_pool import WorkerPool
from pipeline.data.shards import plan_shards
from pipeline.data.tables import TargetArrays, read_targets, targets_table
from pipeline.errors import StorageError, WorkerError
from pipeline.job.config import JobConfig
from pipeline.plan import Plan, make_plan
from pipeline.progress import Progress
from pipeline.run_folder.folder import RunFolder
from pipeline.stages import isolation
from pipeline.stages.context import Context, FoundTargets
from pipeline.stages.target_store import TargetStore
from pipeline.stages.targets import WORTH_A_WORKER, find_targets
from pipeline.storage import retries
from pipeline.storage.store import Store
from pipeline.workers import ray_executor
from pipeline.workers.ray_executor import RayExecutor
from pipeline.workers.worker import TargetSummary, TargetTask
from pmet.request import EditRequest
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("no_ray")

COUNT, SHARD = 24, 8
TEMPLATES = [["{}"]]


# Otherwise workers would import this module, and torch with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Asked(NamedTuple):
    """The part of a task that an oracle needs; the type of tasks itself comes with torch."""

    requests: Sequence[EditRequest]
    rows: Sequence[int]
    output: Store
    name: str


class Oracle:
    """A worker whose targets are easy to check, and which fails on some subjects.

    A request's target is filled with its row number; a subject named in ``poison`` kills the
    process (``kill``), never ends (``hang``), has no target (``unreachable``), or raises.
    """

    def __init__(self, poison: Mapping[str, str] | None = None, journal: str = "") -> None:
        self.poison = poison or {}
        self.journal = journal

    def find_targets(self, task: Asked) -> tuple[Any, ...]:
        requests, rows = task.requests, task.rows
        if self.journal:
            with open(self.journal, "a") as journal:
                journal.write(f"{os.getpid()} {json.dumps(list(rows))}\n")
        for request in requests:
            what = self.poison.get(request.subject) or self.poison.get("everyone")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "hang":
                time.sleep(3600)
            elif what == "no storage":
                raise StorageError("cannot write x (no room); make room there")
            elif what and what != "unreachable":
                raise RuntimeError(what)
        failures = {
            row: "unreachable"
            for request, row in zip(requests, rows, strict=True)
            if self.poison.get(request.subject) == "unreachable"
        }
        rows = [row for row in rows if row not in failures]
        values = np.repeat(np.array(rows, np.float32)[:, None], 64, axis=1)
        file = f"{task.name}-{os.urandom(4).hex()}.parquet"
        steps = np.array(rows, np.int32) % 25
        task.output.write_table(file, targets_table(rows, values, steps, values[:, 0] / 7))
        return file, task.output.sha256(file), failures, 0, len(rows)


class Stuck(Oracle):
    """A worker of a real executor."""

    def __init__(self, source: Any) -> None:
        super().__init__({os.environ["PMET_TEST_STUCK"]: "hang"})

    def find_targets(self, task: Any) -> Any:
        return TargetSummary(*super().find_targets(task))


def asked(task: TargetTask) -> Asked:
    return Asked(task.requests, task.rows, task.output, task.name)


class Team:
    """A fake executor."""

    def __init__(self, make: Callable[[], Pool]) -> None:
        self.make = make
        self.pool: Pool | None = None
        self.tasks = 0
        self.worth: list[int] = []
        self.expected: list[int] = []
        self.taken = 0

    def try_all(
        self, method: str, tasks: Sequence[Task], take: Any, *, workers: int, on_drained: Any
    ) -> Any:
        by_key = {task.key: task for task in tasks}

        def counted(task: Task, value: Any) -> None:
            take(by_key[task.key], TargetSummary(*value))
            self.taken += 1

        self.tasks += len(tasks)
        self.worth.append(workers)
        self.pool = self.pool or self.make()
        light = [replace(task, args=(asked(*task.args),)) for task in tasks]
        failed = self.pool.run(method, light, counted, workers=workers, on_drained=on_drained)
        return [replace(each, task=by_key[each.task.key]) for each in failed]

    def expect_ranks(self, factory: type, init_args: tuple[Any, ...]) -> None:
        self.expected.append(self.taken)

    def release(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("inputs")
    facts = json.loads((GOLDEN / "facts.json").read_text())[:COUNT]
    rows = [{k: f[k] for k in ("prompt", "subject", "target_new")} for f in facts]
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    job = JobConfig.model_validate(
        {
            "model": str(GOLDEN / "gpt2" / "model"),
            "requests": (str(folder / "requests.parquet"),),
            "output": "unused",
            "hparams": str(GOLDEN / "gpt2" / "hparams.json"),
            "second_moments": str(GOLDEN / "gpt2" / "second_moments.safetensors"),
            "targets": {"shard_size": SHARD},
        }
    )
    return make_plan(job)


def begun(plan: Plan, url: str) -> RunFolder:
    folder = RunFolder(url)
    folder.begin(plan.digests, seed=0)
    return folder


def found_in(
    plan: Plan,
    url: str,
    poison: Mapping[str, str] | None = None,
    make: Any = SerialPool,
    **options: Any,
) -> tuple[FoundTargets, RunFolder, Team]:
    """Run the stage on a folder."""
    folder = begun(plan, url)
    journal = options.pop("journal", "")
    known = options.pop("known", frozenset())
    team = Team(lambda: make(Oracle, init_args=(poison, journal), **options))
    context = Context(plan, folder, cast(RayExecutor, team), Progress())
    try:
        return find_targets(context, TEMPLATES, known), folder, team
    finally:
        team.release()


def values(plan: Plan, found: FoundTargets, folder: RunFolder) -> dict[int, np.ndarray]:
    """Return every target by row; check that files hold their shards' rows in the plan's order."""
    by_row: dict[int, np.ndarray] = {}
    for shard in plan.target_shards:
        arrays = read_targets(folder.store.read_table(found.files[shard.index]))
        planned = plan.table.rows[shard.start : shard.stop]
        assert arrays.rows.tolist() == [r for r in planned if r in set(arrays.rows.tolist())]
        by_row |= dict(zip(arrays.rows.tolist(), arrays.values, strict=True))
    return by_row


def subject(plan: Plan, place: int) -> str:
    return plan.table.requests[place].subject


def test_every_shard_is_found_recorded_and_used_again(plan: Plan, tmp_path: Path) -> None:
    found, folder, team = found_in(plan, str(tmp_path))
    assert team.tasks == 3
    assert found.failures == {}
    assert {r: v[0] for r, v in values(plan, found, folder).items()} == {
        row: row for row in range(COUNT)
    }
    record = folder.recorded("targets-00001")
    assert record is not None
    assert record["rows"] == SHARD
    assert record["sha256"] == folder.store.sha256(record["file"])
    again, _, idle = found_in(plan, str(tmp_path))
    assert idle.tasks == 0
    assert again == found


def test_the_ranks_are_expected_when_the_last_shard_is_handed_out(
    plan: Plan, tmp_path: Path
) -> None:
    _, _, team = found_in(plan, str(tmp_path))
    assert team.expected == [2]
    assert team.worth == [-(-COUNT // WORTH_A_WORKER)]


def test_few_requests_are_worth_one_worker_and_the_ranks_at_once(
    plan: Plan, tmp_path: Path
) -> None:
    known = frozenset(plan.table.rows[:-3])
    _, _, team = found_in(plan, str(tmp_path), known=known)
    assert team.expected[0] == 0
    assert team.worth == [1]


def test_no_ranks_are_expected_while_bad_requests_are_looked_for(
    plan: Plan, tmp_path: Path
) -> None:
    bad = {"everyone": "no room in memory"}
    with pytest.raises(WorkerError):
        found_in(plan, str(tmp_path), bad)
    _, _, team = found_in(plan, str(tmp_path), {subject(plan, 3): "the library fell over"})
    assert len(team.worth) > 1
    assert len(team.expected) == 1


def test_poisonous_requests_are_isolated_and_all_others_found(plan: Plan, tmp_path: Path) -> None:
    bad = {subject(plan, place): "the library fell over" for place in (3, 12)}
    found, folder, _ = found_in(plan, str(tmp_path), bad)
    rows = {plan.table.rows[place] for place in (3, 12)}
    assert set(found.failures) == rows
    for row in rows:
        assert found.failures[row].startswith(
            "it fails on every worker, even alone (RuntimeError: the library fell over"
        )
    got = values(plan, found, folder)
    assert {r: v[0] for r, v in got.items()} == {r: r for r in range(COUNT) if r not in rows}
    record = folder.recorded("targets-00000")
    assert record is not None
    assert record["isolated"] == [plan.table.rows[3]]
    assert record["rows"] == SHARD - 1
    assert folder.recorded("targets-00002")["isolated"] == []  # type: ignore[index]
    assert [e["kind"] for e in folder.status["events"]] == ["isolated"] * 2
    (stage,) = folder.status["stages"]
    assert stage["detail"]["isolated"] == 2
    # A resumed run does not try any of them again.
    again, _, idle = found_in(plan, str(tmp_path), bad)
    assert idle.tasks == 0
    assert again == found


def test_a_request_that_kills_its_workers_is_isolated(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One attempt each, because starting a worker takes seconds.
    monkeypatch.setattr(isolation, "GROUP_ATTEMPTS", 1)
    monkeypatch.setattr(isolation, "SINGLE_ATTEMPTS", 1)
    plan = replace(plan, target_shards=plan_shards(4, 4))
    journal = tmp_path / "journal"
    with ray_session("local", num_cpus=1):
        found, folder, _ = found_in(
            plan,
            str(tmp_path / "run"),
            {subject(plan, 2): "kill"},
            WorkerPool,
            count=1,
            max_attempts=1,
            journal=str(journal),
        )
    (row,) = found.failures
    assert row == plan.table.rows[2]
    assert "ActorDiedError" in found.failures[row]
    assert "its worker process exited without an error message" in found.failures[row]
    others = {r: r for r in plan.table.rows[:4] if r != row}
    assert {r: v[0] for r, v in values(plan, found, folder).items()} == others
    tried = [line.split(" ", 1) for line in journal.read_text().splitlines()]
    deadly = [pid for pid, rows in tried if row in json.loads(rows)]
    assert len(deadly) == len(set(deadly)) == 3


def test_a_request_that_hangs_its_workers_is_isolated(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One try of each: a worker that starts takes seconds.
    monkeypatch.setattr(isolation, "GROUP_ATTEMPTS", 1)
    monkeypatch.setattr(isolation, "SINGLE_ATTEMPTS", 1)
    monkeypatch.setattr(ray_executor, "WorkerPool", partial(WorkerPool, max_attempts=1))
    plan = replace(plan, target_shards=plan_shards(2, 2))
    targets = plan.job.targets.model_copy(update={"workers": 1, "timeout": 1.0})
    plan = replace(plan, job=plan.job.model_copy(update={"targets": targets}))
    hanging, other = subject(plan, 1), plan.table.rows[0]
    monkeypatch.setattr(ray_executor, "ModelWorker", Stuck)
    # No update follows, so no rank needs to start.
    monkeypatch.setattr(RayExecutor, "expect_ranks", lambda *_: None)
    monkeypatch.setenv("PMET_TEST_STUCK", hanging)
    events: list[str] = []
    folder = begun(plan, str(tmp_path))
    with RayExecutor(plan, None, lambda kind, _, **__: events.append(kind)) as team:
        found = find_targets(Context(plan, folder, team, Progress()), TEMPLATES)
    (row,) = found.failures
    assert row == plan.table.rows[1]
    assert found.failures[row].endswith("(TimeoutError: hung, or took longer than 1 s)")
    assert {r: v[0] for r, v in values(plan, found, folder).items()} == {other: other}
    # One attempt at the shard, one at the request alone.
    assert events.count("timeout") == 2


def test_a_storage_that_fails_is_no_requests_fault(plan: Plan, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    bad = {subject(plan, 12): "no storage"}
    said = r"^shard 00001 .*cannot write x \(no room\); make room"
    with pytest.raises(StorageError, match=said):
        found_in(plan, str(tmp_path / "run"), bad, journal=str(journal))
    tried = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    assert len([rows for rows in tried if plan.table.rows[12] in rows]) == 3
    # The others' targets are kept.
    _, _, team = found_in(plan, str(tmp_path / "run"))
    assert team.tasks == 1


def test_a_storage_that_stays_away_fails_the_run_which_goes_on_later(
    plan: Plan, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(retries, "PATIENCE_S", 1.0)
    done = []
    record = RunFolder.record

    def stop_after_the_first(self: RunFolder, name: str, value: Any) -> None:
        record(self, name, value)
        done.append(name)
        server.stop()

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "record", stop_after_the_first)
        with pytest.raises(StorageError, match=r"s3://.*can be reached, then run the same job"):
            found_in(plan, s3_url)
    server = ThreadedMotoServer(ip_address=host, port=port, verbose=False)
    server.start()
    found, folder, team = found_in(plan, s3_url)
    assert len(done) == 1
    assert team.tasks == 2
    assert {r: v[0] for r, v in values(plan, found, folder).items()} == {
        row: row for row in range(COUNT)
    }
    server.stop()


def test_each_is_tried_several_times(plan: Plan, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    bad = {subject(plan, 5): "fell over"}
    found_in(plan, str(tmp_path / "run"), bad, journal=str(journal))
    tried = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    sizes = [len(rows) for rows in tried if plan.table.rows[5] in rows]
    # Three attempts at the shard, two at its half and its quarter, three at the request.
    assert sizes == [8, 8, 8, 4, 4, 2, 2, 1, 1, 1]


def test_a_fault_of_all_requests_fails_the_run_and_rejects_none(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^at least 6 .*RuntimeError: no room .*run the same"):
        found_in(plan, str(tmp_path), {"everyone": "no room"})
    folder = begun(plan, str(tmp_path))
    assert not any(folder.recorded(f"targets-{s.name}") for s in plan.target_shards)
    assert folder.status["events"] == []


def test_requests_isolated_by_an_earlier_attempt_count(plan: Plan, tmp_path: Path) -> None:
    bad = {subject(plan, place): "fell over" for place in (0, 1, 2)}
    first, folder, _ = found_in(plan, str(tmp_path), bad)
    assert len(first.failures) == 3
    folder.store.delete("records/targets-00001.json")
    more = {subject(plan, place): "fell over" for place in (8, 9, 10)}
    with pytest.raises(WorkerError, match=r"at least 3 requests .*, of which 2 may be set aside"):
        found_in(plan, str(tmp_path), more)


def test_a_shard_of_poison_alone_has_an_empty_file(plan: Plan, tmp_path: Path) -> None:
    plan = replace(plan, target_shards=plan.target_shards[:2])
    small = replace(plan.target_shards[0], start=7, stop=8)
    plan = replace(plan, target_shards=[small, plan.target_shards[1]])
    found, folder, _ = found_in(plan, str(tmp_path), {subject(plan, 7): "fell over"})
    assert set(found.failures) == {plan.table.rows[7]}
    assert len(read_targets(folder.store.read_table(found.files[0])).rows) == 0


def test_known_requests_leave_their_shards_and_cut_no_others(plan: Plan, tmp_path: Path) -> None:
    # All of the first shard, and two of the second.
    known = frozenset(plan.table.rows[:SHARD] + plan.table.rows[10:12])
    journal, store = tmp_path / "journal", str(tmp_path / "store")
    stored = storing(plan, store)
    found, folder, team = found_in(stored, str(tmp_path / "run"), journal=str(journal), known=known)
    tried = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    second, third = plan.table.rows[SHARD : 2 * SHARD], plan.table.rows[2 * SHARD :]
    assert tried == [[row for row in second if row not in known], list(third)]
    assert team.tasks == 2
    assert found.known == known
    assert found.failures == {}
    expected = [row for row in plan.table.rows if row not in known]
    assert found.edited(plan.table.rows) == expected
    assert sorted(values(plan, found, folder)) == sorted(expected)
    assert [folder.recorded(f"targets-0000{i}")["rows"] for i in range(3)] == [0, 6, 8]  # type: ignore[index]
    again, _, idle = found_in(stored, str(tmp_path / "run"), known=known)
    assert idle.tasks == 0
    assert again == found
    # The others were not found, so they are not stored.
    _, other, _ = found_in(stored, str(tmp_path / "other"))
    assert stage_detail(other)["stored"] == len(expected)


def test_the_limit_of_isolated_requests_counts_only_those_computed(
    plan: Plan, tmp_path: Path
) -> None:
    known = frozenset(plan.table.rows[:20])
    bad = {subject(plan, place): "fell over" for place in (20, 21, 22)}
    with pytest.raises(WorkerError, match=r"at least 3 requests .*, of which 2 may be set aside"):
        found_in(plan, str(tmp_path), bad, known=known)


def storing(plan: Plan, url: str) -> Plan:
    """The plan of the same job with a store of targets."""
    targets = plan.job.targets.model_copy(update={"store": url})
    return replace(plan, job=plan.job.model_copy(update={"targets": targets}))


def with_new_facts(plan: Plan, *places: int) -> Plan:
    requests = list(plan.table.requests)
    for place in places:
        old = requests[place]
        requests[place] = EditRequest(old.prompt, old.subject, f"{old.target_new} again")
    return replace(plan, table=replace(plan.table, requests=requests))


def stage_detail(folder: RunFolder) -> dict[str, Any]:
    (stage,) = folder.status["stages"]
    return dict(stage["detail"])


def test_another_run_computes_only_what_the_store_lacks(plan: Plan, any_url: str) -> None:
    store = f"{any_url}/store"
    first, folder, team = found_in(storing(plan, store), f"{any_url}/1")
    assert team.tasks == 3
    assert stage_detail(folder)["stored"] == 0
    changed = with_new_facts(storing(plan, store), 3, 5)
    second, other, team = found_in(changed, f"{any_url}/2")
    assert team.tasks == 1, "shards that are stored as a whole need no worker"
    detail = stage_detail(other)
    assert (detail["stored"], detail["found"]) == (COUNT - 2, 2)
    assert other.recorded("targets-00000")["stored"] == SHARD - 2  # type: ignore[index]
    one, two = values(plan, first, folder), values(plan, second, other)
    assert all(np.array_equal(one[row].view(np.int32), two[row].view(np.int32)) for row in one)
    columns = ["row", "steps", "loss"]
    for index, file in first.files.items():
        stored = other.store.read_table(second.files[index], columns)
        assert stored == folder.store.read_table(file, columns)
    _, _, team = found_in(changed, f"{any_url}/3")
    assert team.tasks == 0


def test_the_few_that_shards_lack_are_computed_together(plan: Plan, tmp_path: Path) -> None:
    """A batch of one is slow, and in a refresh most shards lack one fact or none."""
    plan = storing(plan, str(tmp_path / "store"))
    found_in(plan, str(tmp_path / "1"))
    changed = with_new_facts(plan, 1, 9, 12, 20, 23)
    journal = tmp_path / "journal"
    bad = {subject(plan, 12): "unreachable"}
    found, folder, _ = found_in(changed, str(tmp_path / "2"), bad, journal=str(journal))
    computed = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    assert computed == [[plan.table.rows[place] for place in (1, 9, 12, 20, 23)]]
    lost = plan.table.rows[12]
    assert found.failures == {lost: "unreachable"}
    assert folder.recorded("targets-00001")["failures"] == {str(lost): "unreachable"}  # type: ignore[index]
    got = values(plan, found, folder)
    assert {r: v[0] for r, v in got.items()} == {r: r for r in range(COUNT) if r != lost}
    # Each target is in the store under its own key.
    _, folder, team = found_in(changed, str(tmp_path / "3"))
    assert (team.tasks, stage_detail(folder)["found"]) == (1, 1)


def test_what_shards_lack_is_never_more_together_than_a_shard(plan: Plan, tmp_path: Path) -> None:
    plan = storing(plan, str(tmp_path / "store"))
    found_in(plan, str(tmp_path / "1"))
    changed = with_new_facts(plan, *range(5), *range(8, 12), *range(16, 20))
    journal = tmp_path / "journal"
    found_in(changed, str(tmp_path / "2"), journal=str(journal))
    computed = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    assert [len(rows) for rows in computed] == [5, 8]


def test_a_poisonous_request_among_those_missing_from_shards_is_isolated(
    plan: Plan, tmp_path: Path
) -> None:
    plan = storing(plan, str(tmp_path / "store"))
    found_in(plan, str(tmp_path / "1"))
    changed = with_new_facts(plan, 1, 9, 20)
    bad = {subject(plan, 9): "fell over"}
    found, folder, _ = found_in(changed, str(tmp_path / "2"), bad)
    assert list(found.failures) == [plan.table.rows[9]]
    assert folder.recorded("targets-00001")["isolated"] == [plan.table.rows[9]]  # type: ignore[index]
    assert len(values(plan, found, folder)) == COUNT - 1
    assert stage_detail(folder)["found"] == 2


def test_what_was_found_before_a_failure_is_in_the_store(plan: Plan, tmp_path: Path) -> None:
    plan = storing(plan, str(tmp_path / "store"))
    bad = {subject(plan, place): "fell over" for place in range(16, 24)}
    with pytest.raises(WorkerError):
        found_in(plan, str(tmp_path / "1"), bad)
    _, folder, _ = found_in(plan, str(tmp_path / "2"))
    assert stage_detail(folder)["stored"] == 16


def test_an_isolated_request_is_not_in_the_store(plan: Plan, tmp_path: Path) -> None:
    plan = storing(plan, str(tmp_path / "store"))
    found_in(plan, str(tmp_path / "1"), {subject(plan, 9): "fell over"})
    found, folder, team = found_in(plan, str(tmp_path / "2"))
    assert team.tasks == 1
    assert stage_detail(folder) | {"stored": COUNT - 1, "found": 1} == stage_detail(folder)
    assert found.failures == {}
    assert len(values(plan, found, folder)) == COUNT


def test_a_shared_target_is_taken_from_the_store_whole_or_not_at_all(
    plan: Plan, tmp_path: Path
) -> None:
    """A new sibling requires new targets for all requests that share its key."""
    groups = array("q", [0, 0, 0, *range(3, COUNT)])
    plan = replace(storing(plan, str(tmp_path / "store")), groups=groups)
    found_in(plan, str(tmp_path / "1"))
    _, folder, team = found_in(plan, str(tmp_path / "2"))
    assert (stage_detail(folder)["stored"], team.tasks) == (COUNT, 0)
    assert stage_detail(folder)["shared_keys"] == 3
    _, folder, _ = found_in(with_new_facts(plan, 1), str(tmp_path / "3"))
    assert (stage_detail(folder)["stored"], stage_detail(folder)["found"]) == (COUNT - 3, 3)


def test_a_shared_target_of_which_the_store_lacks_a_part_is_computed_whole(
    plan: Plan, tmp_path: Path
) -> None:
    plan = storing(plan, str(tmp_path / "store"))
    plan = replace(plan, groups=array("q", [0, 0, 0, *range(3, COUNT)]))
    kept = TargetStore.of(plan, TEMPLATES)
    assert kept is not None
    values = np.zeros((4, 64), np.float32)
    values[1] = np.nan
    zeros = np.zeros(4, np.float32)
    arrays = TargetArrays(np.arange(4), values, zeros.astype(np.int32), zeros)
    kept.write(plan.table.requests[:4], arrays, [0, 0, 0, 3])
    _, folder, _ = found_in(plan, str(tmp_path / "run"))
    assert (stage_detail(folder)["stored"], stage_detail(folder)["found"]) == (1, COUNT - 1)
