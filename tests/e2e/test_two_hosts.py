"""Two hosts with separate addresses and model caches; one is cut off and comes back.

Hosts are network namespaces of this machine. They share nothing but S3, which holds the model, the
requests and the run folder. The head drives and computes nothing, as in cluster.yaml, so the run
waits while the other host is away.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import psutil
import pytest
import yaml

from pipeline.run import run_job
from tests.conftest import GOLDEN, RAY_JOB, ROOT
from tests.e2e.conftest import assert_same_weights, job, wait_until, worker_of
from tests.e2e.test_run import weights

HEAD, OTHER = "198.18.77.1", "198.18.77.2"
S3 = f"http://{HEAD}:5055"
TOKEN = "a-token-of-this-test-and-of-nothing-else"
PATIENCE_S = 400

until = partial(wait_until, within_s=PATIENCE_S, every_s=0.2)


@dataclass
class Host:
    """A network namespace and the processes that run in it."""

    name: str
    address: str
    tmp: Path
    cpus: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name != RAY_JOB},
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.tmp),
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "1000",
            # A host with little processor time is silent for a few seconds, and not cut off.
            "RAY_health_check_failure_threshold": "12",
            "RAY_API_SERVER_ADDRESS": f"http://{HEAD}:8265",
            "PMET_PYTHON": sys.executable,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": S3,
            "COLUMNS": "200",
        }

    def command(self, *arguments: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, sys.executable, *map(str, arguments)]

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start Python with arguments, and again whenever it ends, until the test ends.

        A node that joins while its head is busy gives up after half a minute; whatever starts
        nodes, a service manager or Kubernetes, starts it again.
        """
        log = (self.tmp / f"{len(self.running)}.log").open("wb")
        supervised = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "supervisor"]
        process = subprocess.Popen(
            [*supervised, *self.command(*arguments)],
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def start_ray(self, *arguments: object) -> None:
        options = ["--node-ip-address", self.address, "--num-cpus", str(self.cpus), "--block"]
        self.start("-m", "ray.scripts.scripts", "start", *arguments, *options)

    @property
    def logs(self) -> str:
        """The ends of what its processes have printed."""
        texts = [file.read_text(errors="replace")[-2000:] for file in self.tmp.glob("*.log")]
        return "\n".join([f"{self.name}:", *texts])

    def run(self, *arguments: object, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment | changed,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def get(self, url: str) -> bytes:
        """Return what a URL holds, as seen from this host; empty on failure. Faster than `pmet`."""
        return subprocess.run(
            self.command("-S", "-c", GET, url), capture_output=True, timeout=PATIENCE_S
        ).stdout

    def pmet(self, *arguments: object, **changed: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "jobs", *arguments, **changed)

    def computes(self) -> bool:
        """Whether a worker started here is currently running a task."""
        with suppress(psutil.NoSuchProcess):
            return any(worker_of(process.pid) for process in self.running)
        return False

    def end(self) -> None:
        """End all processes started here, with their children."""
        for process in self.running:
            family: list[psutil.Process] = []
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            for child in family:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.running.clear()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two connected hosts: one with a Ray head and S3, the other empty."""
    names = [f"pmet{os.getpid()}{letter}" for letter in "ab"]
    with ExitStack() as stack:
        # Short names, because Ray's sockets are below and a socket's path has at most 107
        # characters.
        made = [
            Host(name, address, Path(stack.enter_context(TemporaryDirectory(prefix="h"))), cpus)
            for name, address, cpus in zip(names, (HEAD, OTHER), (0, 2), strict=True)
        ]
        try:
            for host in made:
                ip("netns", "add", host.name)
                stack.callback(ip, "netns", "del", host.name)
            ip(
                "link",
                "add",
                "wire",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "wire",
                "netns",
                names[1],
            )
            for host in made:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "wire")
                for device in ("lo", "wire"):
                    ip("-n", host.name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)!r}")
        for host in made:
            stack.callback(host.end)
        head, other = made
        head.start("-m", "moto.server", "-H", HEAD, "-p", "5055")
        dashboard = ["--dashboard-host", HEAD, "--include-dashboard", "true"]
        head.start_ray("--head", "--port", "6379", *dashboard)
        # Ray answers this request without a token.
        until(lambda: head.get(f"http://{HEAD}:8265/api/gcs_healthz"))
        yield head, other


GET = """
import sys
from urllib.request import urlopen
sys.stdout.buffer.write(urlopen(sys.argv[1], timeout=5).read())
"""
UPLOAD = """
import sys, boto3
boto3.client("s3").create_bucket(Bucket="pmet")
from pipeline.storage.store import Store
from pathlib import Path
for source in map(Path, sys.argv[1:]):
    for file in source.iterdir() if source.is_dir() else [source]:
        Store(f"s3://pmet/{source.stem}").write_bytes(file.name, file.read_bytes())
"""
DOWNLOAD = """
import sys, fsspec
fsspec.filesystem("s3").get("pmet/runs/1", sys.argv[1], recursive=True)
"""


@pytest.mark.slow
def test_a_missing_or_wrong_token_is_explained(hosts: tuple[Host, Host]) -> None:
    head, _ = hosts
    none = head.pmet("list", RAY_AUTH_MODE="disabled")
    assert none.returncode == 1
    assert "requires a token, and none was given (HTTP 401): set RAY_AUTH_MODE=token" in none.stderr
    wrong = head.pmet("list", RAY_AUTH_TOKEN=TOKEN[::-1])
    assert wrong.returncode == 1
    assert "does not accept this token (HTTP 403)" in wrong.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_host_that_is_cut_off_and_comes_back(
    hosts: tuple[Host, Host], inputs: Path, tmp_path: Path
) -> None:
    head, other = hosts
    golden = GOLDEN / "gpt2"
    moments, requests = golden / "second_moments.safetensors", inputs / "requests.parquet"
    uploaded = head.run("-c", UPLOAD, golden / "model", moments, requests)
    assert uploaded.returncode == 0, uploaded.stderr
    for name in ("hparams", "context_templates"):
        shutil.copy(golden / f"{name}.json", head.tmp)
    values = {
        "model": "s3://pmet/model",
        "requests": "s3://pmet/requests/requests.parquet",
        "output": "s3://pmet/runs/1",
        "hparams": f"{name_of(head, 'hparams')}",
        "second_moments": "s3://pmet/second_moments/second_moments.safetensors",
        "context_templates": f"{name_of(head, 'context_templates')}",
        "evaluate": {"sample": 4},
        "targets": {"workers": 2, "shard_size": 4},
        "update": {"ranks": 2},
    }
    file = head.tmp / "job.yaml"
    file.write_text(yaml.safe_dump(values))
    submitted = head.pmet("submit", file)
    assert submitted.returncode == 0, submitted.stderr
    name = next(word for word in submitted.stdout.split() if word.startswith("pmet-1-"))

    record = signed_url("runs/1/run.json")

    def events(word: str) -> list[str]:
        status = json.loads(head.get(record) or b"{}")
        return [str(event) for event in status.get("events") or [] if word in str(event)]

    # A node that is added when there is work, as by an autoscaler.
    assert "waiting for nodes, 15 minutes at most" in until(lambda: events("waiting"))[0]
    other.start_ray("--address", f"{HEAD}:6379")
    # The host has fetched its own copy of the model, and is running a task.
    try:
        until(lambda: list((other.tmp / f"pmet-{os.getuid()}" / "models").glob("*.checked")))
    except AssertionError:
        pytest.fail(f"the other host fetched nothing\n{head.logs}\n{other.logs}")
    until(other.computes, every_s=0.01)
    ip("-n", other.name, "link", "set", "wire", "down")

    until(lambda: events("was lost on"))
    ip("-n", other.name, "link", "set", "wire", "up")
    # Ray has given up the node, so its supervisor restarts it.
    other.end()
    other.start_ray("--address", f"{HEAD}:6379")
    ended = head.pmet("logs", name, "--follow")
    assert ended.returncode == 0, ended.stderr
    shown = head.pmet("status", name, "--json")
    said = json.loads(shown.stdout)
    assert said["submission"]["exit_status"] == 0, ended.stdout
    assert any("was lost on" in str(event) for event in said["folder"]["events"])
    there = tmp_path / "there"
    fetched = head.run("-c", DOWNLOAD, there)
    assert fetched.returncode == 0, fetched.stderr
    here = run_job(
        job(
            inputs,
            str(tmp_path / "here"),
            corpus=None,
            second_moments=str(moments),
            evaluate={"sample": 4},
            targets={"workers": 0, "shard_size": 4},
        )
    )
    submitted_run = type(here)("complete", type(here.folder)(there), here.metrics)
    assert_same_weights(weights(here), weights(submitted_run))


def signed_url(key: str) -> str:
    """Return a URL to read a file of the bucket without an S3 library."""
    secrets = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    client = boto3.client("s3", endpoint_url=S3, region_name="us-east-1", **secrets)
    return str(
        client.generate_presigned_url("get_object", {"Bucket": "pmet", "Key": key}, ExpiresIn=3600)
    )


def name_of(host: Host, name: str) -> str:
    return str(host.tmp / f"{name}.json")
