"""Ranks live and die together, and the error names the rank that caused it."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import ray

from pipeline.cluster.rank_group import RankGroup, Rendezvous
from pipeline.cluster.session import ray_session
from pipeline.errors import WorkerError
from pmet.errors import InputError, NotPositiveDefiniteError


class Member:
    """A rank that can wait for the others in a real collective operation."""

    def __init__(self, rendezvous, *, guilty=None, error=None):
        import torch.distributed as dist

        if rendezvous.rank == guilty:
            raise error
        rank, world_size, address, port = rendezvous
        dist.init_process_group(
            "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=world_size
        )
        self.rendezvous = rendezvous
        self.barrier = dist.barrier

    def greet(self, *words):
        self.barrier()
        return (self.rendezvous.rank, os.getpid(), *words)

    def meeting(self):
        return self.rendezvous, os.environ["OMP_NUM_THREADS"]

    def fall(self, guilty, error):
        if self.rendezvous.rank == guilty:
            raise error
        self.barrier()

    def die(self, guilty):
        if self.rendezvous.rank == guilty:
            os.kill(os.getpid(), signal.SIGKILL)
        self.barrier()

    def tarry(self, guilty, seconds):
        if self.rendezvous.rank == guilty:
            time.sleep(seconds)


class Light(Member):
    """The same without torch, whose import takes seconds: where any way to wait will do."""

    def __init__(self, rendezvous, *, guilty=None, error=None):
        if rendezvous.rank == guilty:
            raise error
        self.rendezvous = rendezvous
        self.peers = meet(rendezvous)

    def barrier(self):
        """Wait until each rank has sent a byte; rank 0 hears all others and answers."""
        hears = self.rendezvous.rank == 0
        for answer in (False, True):
            for peer in self.peers:
                if hears == answer:
                    peer.sendall(b".")
                elif not peer.recv(1):
                    raise ConnectionResetError("connection reset by a peer")


def meet(rendezvous):
    """The sockets between rank 0 and each other rank."""
    rank, world_size, *address = rendezvous
    if rank == 0:
        with socket.create_server(tuple(address)) as server:
            return [server.accept()[0] for _ in range(world_size - 1)]
    end = time.monotonic() + 60
    while True:
        try:
            return [socket.create_connection(tuple(address))]
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)


class Unready(Light):
    """A group whose rank 1 raises while the others wait for it."""

    def __init__(self, rendezvous):
        super().__init__(rendezvous, guilty=1, error=OSError("no such checkpoint"))


class Refusing(Light):
    """A group whose rank 0 finds that the input is invalid."""

    def __init__(self, rendezvous):
        super().__init__(rendezvous, guilty=0, error=InputError("not a model"))


@pytest.fixture(scope="module", autouse=True)
def cluster(no_ray):
    with ray_session("local", num_cpus=3):
        yield


def gone(pid):
    """Whether a process ends within a few seconds."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_results_come_in_the_order_of_the_ranks():
    with RankGroup(Member, ranks=3, threads=2) as group:
        assert group.size == 3
        assert [r[::2] for r in group.call_all("greet", "hello")] == [
            (0, "hello"),
            (1, "hello"),
            (2, "hello"),
        ]
        own = group.call_each("greet", [("a",), ("b", "c"), ()])
        assert [r[2:] for r in own] == [("a",), ("b", "c"), ()]
        meetings = group.call_all("meeting")
        with pytest.raises(ValueError, match="2 tuples of arguments for 3 ranks"):
            group.call_each("greet", [(), ()])
    places = [place for place, _ in meetings]
    assert [place.rank for place in places] == [0, 1, 2]
    assert {place[1:] for place in places} == {(3, "127.0.0.1", places[0].master_port)}
    assert isinstance(places[0], Rendezvous)
    assert {threads for _, threads in meetings} == {"2"}
    with pytest.raises(WorkerError, match="this group of ranks is closed"):
        group.call_all("greet")


def test_ranks_are_made_while_others_go_on():
    start = time.monotonic()
    with RankGroup(Light, ranks=2, wait=False) as group:
        begun = time.monotonic() - start
        answers = [rank for rank, _ in group.call_all("greet")]
    assert answers == [0, 1]
    assert begun < (time.monotonic() - start) / 2


@pytest.mark.parametrize(
    ("factory", "raised"), [(Refusing, InputError), (Unready, WorkerError)], ids=["input", "other"]
)
def test_what_was_not_waited_for_is_raised_by_the_first_call(factory, raised):
    with RankGroup(factory, ranks=2, wait=False) as group:
        with pytest.raises(raised):
            group.call_all("greet")
        assert group.size == 0


def test_one_rank_raises_while_the_others_wait():
    with RankGroup(Light, ranks=3) as group:
        pids = [pid for _, pid in group.call_all("greet")]
        start = time.monotonic()
        with pytest.raises(
            WorkerError, match=r"^rank 1 of 3 failed in fall: ArithmeticError: singular \("
        ) as raised:
            group.call_all("fall", 1, ArithmeticError("singular"))
        assert time.monotonic() - start < 5
        assert "in fall" in raised.value.cause_text
        assert all(gone(pid) for pid in pids)
        assert group.size == 0


def test_the_rank_that_was_killed_is_named_and_not_its_peers():
    with RankGroup(Member, ranks=3) as group:
        pids = [pid for _, pid in group.call_all("greet")]
        start = time.monotonic()
        with pytest.raises(
            WorkerError,
            match=r"^rank 2 of 3 failed in die: ActorDiedError: .*exited without .*SIGKILL",
        ):
            group.call_all("die", 2)
        assert time.monotonic() - start < 5
        assert all(gone(pid) for pid in pids)


def test_a_deadline():
    with RankGroup(Light, ranks=2, deadline_s=60.0) as group:
        group.call_all("tarry", 1, 0.5)
        start = time.monotonic()
        with pytest.raises(
            WorkerError,
            match=r"^tarry was not finished within 0\.5 s; still waiting for rank 1 of 2$",
        ):
            group.call_all("tarry", 1, 3600, deadline_s=0.5)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", [InputError, NotPositiveDefiniteError])
def test_what_another_group_would_meet_again_is_raised_as_it_is(kind):
    with RankGroup(Light, ranks=2) as group:
        with pytest.raises(kind, match=r"^not a fact$") as raised:
            group.call_all("fall", 1, kind("not a fact"))
        assert type(raised.value) is kind


def test_a_rank_that_cannot_be_made():
    with pytest.raises(
        WorkerError, match=r"^rank 1 of 2 failed in start: OSError: no such checkpoint \("
    ):
        RankGroup(Unready, ranks=2)
    with pytest.raises(InputError, match=r"^not a model$"):
        RankGroup(Refusing, ranks=2)


def test_no_room_and_room_again():
    with pytest.raises(
        WorkerError,
        match=r"^no room for 4 ranks of 1 CPU and 0 GPU within 0\.5 s; the cluster has 3 CPU",
    ):
        RankGroup(Light, ranks=4, start_timeout_s=0.5)
    with RankGroup(Light, ranks=3) as group:
        assert len(group.call_all("greet")) == 3


def test_a_closed_group_leaves_its_resources():
    RankGroup(Light, ranks=1).close()
    end = time.monotonic() + 10
    while time.monotonic() < end and ray.available_resources().get("CPU") != 3.0:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 3.0


def test_no_ranks():
    with pytest.raises(ValueError, match="a group of 0 ranks cannot be made"):
        RankGroup(Light, ranks=0)
