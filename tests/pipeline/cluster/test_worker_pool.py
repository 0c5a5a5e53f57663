"""Both pools pass one suite; deaths of processes are tested with Ray workers only."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from pipeline.cluster.pool import SerialPool
from pipeline.cluster.session import default_workers, ray_session, room_for_workers
from pipeline.cluster.tasks import FailedTask, Task
from pipeline.cluster.worker_pool import WorkerPool
from pipeline.errors import WorkerError
from pmet.errors import InputError, RequestError


class Abacus:
    """A worker that keeps in files what must outlive its process."""

    def __init__(self, offset=0):
        self.offset = offset
        self.calls = 0

    def square(self, number):
        return number * number + self.offset

    def noted_square(self, journal, number):
        with open(journal, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.02)
        return number * number

    def count_calls(self, _):
        self.calls += 1
        return os.getpid(), self.calls

    def stumble(self, folder, number, falls):
        seen = sorted(Path(folder).glob(f"{number}-*"))
        Path(folder, f"{number}-{len(seen)}").touch()
        if len(seen) < falls:
            raise ArithmeticError(f"lost a bead of {number}")
        return number

    def refuse(self, number):
        raise RequestError(f"row {number} has no subject")

    def exhaust(self, folder, number):
        if number == 1 and not Path(folder, "full").exists():
            Path(folder, "full").touch()
            raise MemoryError("no room for beads")
        return os.getpid()

    def die(self, folder, number, deaths):
        seen = sorted(Path(folder).glob(f"{number}-*"))
        Path(folder, f"{number}-{len(seen)}").touch()
        if len(seen) < deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def slow_pid(self, _):
        time.sleep(0.2)
        return os.getpid()

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def environment(self, name):
        return os.environ.get(name)

    def torch_threads(self):
        import torch

        return torch.get_num_threads()


class Unmade:
    def __init__(self, error):
        raise error


class StillbornOnce(Abacus):
    """A worker that kills its process the first time it is created."""

    def __init__(self, marker):
        super().__init__()
        if not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Signing(Abacus):
    """A worker that writes a file when it is created."""

    def __init__(self, folder):
        super().__init__()
        Path(folder, str(os.getpid())).touch()


def tasks_of(*arguments):
    return [Task(str(args[-1]), args) for args in arguments]


def numbers(count, *before):
    return [Task(str(number), (*before, number)) for number in range(count)]


def collect(pool, method, tasks, **options):
    results = {}

    def keep(task, value):
        assert task.key not in results, "a result came twice"
        results[task.key] = value

    return results, pool.run(method, tasks, keep, **options)


@pytest.fixture(scope="module", autouse=True)
def cluster(no_ray):
    with ray_session("local", num_cpus=3):
        yield


class PoolSuite:
    """Behaviour of every pool, on one pool for all tests, as for all stages of a job."""

    workers = 1

    @pytest.fixture(scope="class")
    def shared(self):
        events = []
        with self.make(init_args=(7,), on_event=lambda *event, **_: events.append(event)) as pool:
            pool.events = events
            yield pool

    @pytest.fixture
    def pool(self, shared):
        shared.events.clear()
        return shared

    def make(self, factory=Abacus, **options):
        raise NotImplementedError

    def test_every_task_gives_one_result(self, pool):
        results, failed = collect(pool, "square", numbers(20))
        assert results == {str(n): n * n + 7 for n in range(20)}
        assert failed == []
        assert pool.events == []

    def test_no_tasks_no_results(self, pool):
        assert collect(pool, "square", []) == ({}, [])

    def test_tasks_are_handed_out_in_order(self, pool, tmp_path):
        journal = tmp_path / "journal"
        collect(pool, "noted_square", numbers(12, str(journal)))
        started = [int(line) for line in journal.read_text().split()]
        assert sorted(started) == list(range(12))
        assert all(abs(place - number) < self.workers for place, number in enumerate(started))

    def test_tasks_are_read_lazily(self, pool):
        read, results = [], []

        def tasks():
            for task in numbers(30):
                read.append(task)
                yield task

        def check(task, value):
            results.append(value)
            assert len(read) <= len(results) + self.workers + 1

        pool.run("square", tasks(), check)
        assert len(results) == 30

    def test_it_is_notified_once_when_the_last_task_is_handed_out(self, pool):
        results, told = [], []
        pool.run(
            "square",
            numbers(5),
            lambda task, value: results.append(value),
            on_drained=lambda: told.append(len(results)),
        )
        assert len(told) == 1
        assert 5 - self.workers <= told[0] < 5

    def test_several_stages_share_the_workers(self, pool):
        first, _ = collect(pool, "count_calls", numbers(6))
        squares, _ = collect(pool, "square", numbers(6))
        second, _ = collect(pool, "count_calls", numbers(6))
        assert squares["5"] == 32
        calls = {*first.values(), *second.values()}
        assert len(calls) == 12, "a worker was made anew"
        assert len({pid for pid, _ in calls}) <= self.workers

    def test_an_error_is_tried_again(self, pool, tmp_path):
        tasks = [Task(str(n), (str(tmp_path), n, 2 if n == 3 else 0)) for n in range(6)]
        results, failed = collect(pool, "stumble", tasks)
        assert results == {str(n): n for n in range(6)}
        assert failed == []
        assert [kind for kind, _ in pool.events] == ["retry", "retry"]
        assert pool.events[0][1].startswith(
            "3, attempt 1 of 3: ArithmeticError: lost a bead of 3 ("
        )

    def test_an_error_that_stays_fails_its_task_alone(self, pool, tmp_path):
        before, _ = collect(pool, "count_calls", numbers(6))
        tasks = [Task(str(n), (str(tmp_path), n, 9 if n in (1, 4) else 0)) for n in (4, 0, 2, 1)]
        results, failed = collect(pool, "stumble", tasks)
        after, _ = collect(pool, "count_calls", numbers(6))
        assert results == {"0": 0, "2": 2}
        assert [(item.task.key, item.attempts) for item in failed] == [("4", 3), ("1", 3)]
        assert isinstance(failed[0], FailedTask)
        assert failed[0].failure.text.startswith("ArithmeticError: lost a bead of 4 (")
        assert "test_worker_pool.py:" in failed[0].failure.text
        assert failed[0].failure.text.endswith("in stumble)")
        assert len({pid for pid, _ in [*before.values(), *after.values()]}) <= self.workers


class TestSerialPool(PoolSuite):
    def make(self, factory=Abacus, **options):
        return SerialPool(factory, **options)


class TestOneWorker(PoolSuite):
    def make(self, factory=Abacus, **options):
        return WorkerPool(factory, count=self.workers, **options)


class TestThreeWorkers(TestOneWorker):
    workers = 3


class EndingSuite:
    """Tests that end a pool or need one of their own."""

    def make(self, factory=Abacus, **options):
        raise NotImplementedError

    def test_bad_input_is_raised_at_once(self):
        events = []
        with (
            self.make(on_event=lambda *event, **_: events.append(event)) as pool,
            pytest.raises(RequestError, match=r"^row 0 has no subject$") as raised,
        ):
            collect(pool, "refuse", numbers(1))
        assert type(raised.value) is RequestError
        assert events == []

    def test_a_factory_that_raises_fails_fast(self):
        events = []
        with (
            self.make(
                Unmade,
                init_args=(OSError("no such model"),),
                on_event=lambda *event, **_: events.append(event),
            ) as pool,
            pytest.raises(
                WorkerError, match=r"^no worker can start: OSError: no such model \("
            ) as e,
        ):
            collect(pool, "square", numbers(3))
        assert "no such model" in e.value.cause_text
        assert events == [], "started again"

    def test_a_factory_that_refuses_its_input(self):
        with (
            self.make(Unmade, init_args=(InputError("not a model"),)) as pool,
            pytest.raises(InputError, match=r"^not a model$"),
        ):
            collect(pool, "square", numbers(3))

    def test_an_error_of_the_receiver_closes_the_pool(self):
        def receive(task, value):
            raise KeyError(task.key)

        with self.make() as pool:
            with pytest.raises(KeyError):
                pool.run("square", numbers(3), receive)
            with pytest.raises(WorkerError, match="this pool is closed"):
                collect(pool, "square", numbers(3))

    def test_threads_inside(self):
        import torch

        before = torch.get_num_threads()
        with self.make(threads=3) as pool:
            threads, _ = collect(pool, "torch_threads", [Task("t")])
            tokenizers, _ = collect(pool, "environment", [Task("t", ("TOKENIZERS_PARALLELISM",))])
        assert threads == {"t": 3}
        assert tokenizers == {"t": "false"}
        assert torch.get_num_threads() == before


class TestSerialEnding(EndingSuite):
    def make(self, factory=Abacus, **options):
        return SerialPool(factory, **options)


class TestWorkerEnding(EndingSuite):
    def make(self, factory=Abacus, **options):
        return WorkerPool(factory, count=1, **options)


def test_no_more_workers_are_started_than_a_stage_is_worth(tmp_path):
    with WorkerPool(Signing, init_args=(tmp_path,), count=2) as pool:
        start = time.monotonic()
        collect(pool, "sleep", [Task("t", (0,))], workers=1)
        # Another one would have started by now.
        collect(pool, "sleep", [Task("t", (time.monotonic() - start,))], workers=1)
        assert len(list(tmp_path.iterdir())) == 1
        assert pool.absent == 1
        naps = [Task(str(n), (0.3,)) for n in range(20)]
        collect(pool, "sleep", naps)
        assert pool.absent == 0
        # Existing workers take part, however short the stage is.
        collect(pool, "sleep", naps[:2], workers=1)
        many, _ = collect(pool, "count_calls", numbers(40), workers=1)
        assert len({pid for pid, _ in many.values()}) == 2


def test_a_killed_worker_is_replaced_within_a_second(tmp_path):
    events, times = [], []

    def note(kind, text, **_):
        events.append((kind, text))
        times.append(time.time())

    with WorkerPool(Abacus, count=1, on_event=note) as pool:
        tasks = [Task(str(n), (str(tmp_path), n, 1 if n == 2 else 0)) for n in range(5)]
        results, failed = collect(pool, "die", tasks)
    assert results == {str(n): n for n in range(5)}
    assert failed == []
    assert [kind for kind, _ in events] == ["death", "retry"]
    assert "was lost on 2: ActorDiedError" in events[0][1]
    died = (tmp_path / "2-0").stat().st_mtime
    assert times[1] - died < 1.0


def test_a_poison_task_is_given_up_and_the_others_complete(tmp_path):
    with WorkerPool(Abacus, count=2) as pool:
        tasks = [Task(str(n), (str(tmp_path), n, 99 if n == 2 else 0)) for n in range(6)]
        results, failed = collect(pool, "die", tasks)
    assert sorted(results) == ["0", "1", "3", "4", "5"]
    assert [(item.task.key, item.attempts) for item in failed] == [("2", 3)]
    assert failed[0].failure.text.startswith("ActorDiedError: ")
    assert "without an error message (process " in failed[0].failure.text
    assert "as after signal 9 (SIGKILL)" in failed[0].failure.text
    assert "\n" not in failed[0].failure.text


def test_a_task_that_hangs_is_ended():
    events = []
    pool = WorkerPool(
        Abacus, count=2, task_timeout_s=1.0, max_attempts=2,
        on_event=lambda *event, **_: events.append(event),
    )  # fmt: skip
    with pool:
        results, failed = collect(pool, "sleep", tasks_of((3600,), (0.0,), (0.1,)))
    assert results == {"0.0": 0.0, "0.1": 0.1}
    assert [(item.task.key, item.attempts) for item in failed] == [("3600", 2)]
    assert failed[0].failure.text == "TimeoutError: hung, or took longer than 1 s"
    assert [kind for kind, _ in events] == ["timeout", "retry", "timeout", "failed"]


def test_a_worker_out_of_memory_is_replaced(tmp_path):
    with WorkerPool(Abacus, count=1) as pool:
        results, failed = collect(pool, "exhaust", numbers(3, str(tmp_path)))
    assert failed == []
    assert results["0"] != results["1"] == results["2"]


def test_a_worker_that_dies_while_idle_costs_no_attempt():
    events = []
    with WorkerPool(
        Abacus, count=1, max_attempts=1, on_event=lambda *event, **_: events.append(event)
    ) as pool:
        pids, _ = collect(pool, "count_calls", numbers(1))
        os.kill(pids["0"][0], signal.SIGKILL)
        results, failed = collect(pool, "square", numbers(3))
    assert results == {"0": 0, "1": 1, "2": 4}
    assert failed == []
    assert [kind for kind, _ in events] == ["death"]
    assert "was lost while idle" in events[0][1]


def test_a_start_that_dies_is_tried_again(tmp_path):
    events = []
    with WorkerPool(
        StillbornOnce,
        count=1,
        init_args=(str(tmp_path / "born"),),
        on_event=lambda *event, **_: events.append(event),
    ) as pool:
        results, _ = collect(pool, "square", numbers(2))
    assert results == {"0": 0, "1": 1}
    assert [kind for kind, _ in events] == ["start-failure"]


def test_more_workers_than_fit():
    with WorkerPool(Abacus, count=5) as pool:
        results, _ = collect(pool, "sleep", [Task(str(n), (0.2,)) for n in range(9)])
        pool._start_timeout_s = 0.0
        again, _ = collect(pool, "sleep", [Task(str(n), (0.2,)) for n in range(9)])
    assert len(results) == len(again) == 9


def test_workers_that_never_fit():
    with (
        WorkerPool(Abacus, count=1, num_gpus=2, start_timeout_s=0.5) as pool,
        pytest.raises(
            WorkerError,
            match=r"no worker was ready within 0\.5 s; each needs 1 CPU and 2 GPU, "
            r"the cluster has 3 CPU and 0 GPU",
        ),
    ):
        collect(pool, "square", numbers(1))


def test_an_interrupt_ends_the_workers():
    pids = {}

    def interrupt(task, value):
        pids[task.key] = value[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WorkerPool(Abacus, count=1) as pool:
        pool.run("count_calls", numbers(3), interrupt)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{pids['0']}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{pids['0']}").exists()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="count 0 and max_attempts 3 must be at least 1"):
        WorkerPool(Abacus, count=0)


def test_workers_are_added_when_the_cluster_has_grown(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.worker_pool._LOOK_S", 0.0)
    room = iter([1, 3, 2])
    found = set()
    with WorkerPool(Abacus, count=1, grown=lambda: next(room, 3)) as pool:
        while len(found) < 3:
            pool.run("slow_pid", numbers(6), lambda _task, pid: found.add(pid))
        more = []
        pool.run("slow_pid", numbers(2), lambda _task, pid: more.append(pid), workers=1)
        assert set(more) <= found


def test_no_worker_is_added_beyond_what_a_stage_is_worth(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.worker_pool._LOOK_S", 0.0)
    found = set()
    with WorkerPool(Abacus, count=1, grown=lambda: 3) as pool:
        pool.run("slow_pid", numbers(6), lambda _task, pid: found.add(pid), workers=2)
        assert len(pool._seats) == 2


@pytest.mark.parametrize(
    ("gpus_per_worker", "count"), [(0, 11), (0.3, 9), (0.5, 7), (1, 5), (2, 2), (3, 1), (4, 0)]
)
def test_workers_are_counted_node_by_node(monkeypatch, gpus_per_worker, count):
    """No worker has its GPUs on two nodes, or parts of two GPUs, or no CPU."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 3.0}},
        {"Alive": True, "Resources": {"GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr("pipeline.cluster.session.ray.nodes", lambda: nodes)
    assert room_for_workers(gpus_per_worker) == count


def test_default_workers():
    assert default_workers(0) == 3
    assert default_workers(0, cpus_per_worker=1.5) == 2
    with pytest.raises(
        WorkerError, match="needs 1 CPU and 1 GPU of one node, but the cluster has 3 CPU"
    ):
        default_workers(1)
    with pytest.raises(WorkerError, match="if nodes are added on demand, set the nu"):
        default_workers(1)


def test_a_session_in_use_is_left_running():
    with ray_session("somewhere:1234"):
        assert ray.is_initialized()
    assert ray.is_initialized()


STRAY_DRIVER = """
import sys
sys.path[:0] = {paths!r}
from pipeline.cluster.session import ray_session
from pipeline.cluster.worker_pool import WorkerPool
from pipeline.cluster.tasks import Task
from stray_worker import Stray
with ray_session(num_cpus=1), WorkerPool(Stray, count=1) as pool:
    assert pool.run("hello", [Task("t")], lambda task, value: sys.stdout.write(value)) == []
"""


def test_workers_import_what_only_the_driver_has_on_its_path(tmp_path):
    """A module that is neither installed, nor in the working directory, nor on PYTHONPATH."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stray_worker.py").write_text(
        "import pmet.errors, pipeline.cluster.worker_pool\n"
        "class Stray:\n"
        "    def hello(self):\n"
        "        return 'hello from ' + __name__\n"
    )
    checkout = str(Path(__file__).resolve().parents[3])
    (tmp_path / "elsewhere").mkdir()
    driver = tmp_path / "elsewhere" / "driver.py"
    driver.write_text(STRAY_DRIVER.format(paths=[str(tmp_path / "code"), checkout]))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, str(driver)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello from stray_worker"
    assert done.stderr == ""


UNREACHABLE = """
from pipeline.cluster.session import ray_session
from pipeline.errors import WorkerError
try:
    with ray_session("127.0.0.1:{port}"):
        pass
except WorkerError as error:
    begins = "Ray cannot be reached at '127.0.0.1:{port}': nothing listens "
    assert str(error).startswith(begins), error
    assert "name a running cluster as host:port" in str(error), error
"""


def test_a_cluster_that_does_not_answer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE.format(port=port)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_local_session_listens_on_the_loopback_interface_only():
    assert ray.util.get_node_ip_address() == "127.0.0.1"
