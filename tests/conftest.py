"""Fixtures shared by all tests: the golden numbers, the CounterFact model, S3, single threading."""

from __future__ import annotations

import gc
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pmet.hparams import PMETHyperParams
from pmet.request import EditRequest
from tests.warm_python import executable

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
COUNTERFACT = ROOT.parent / "shared" / "counterfact"
FAMILIES = ("gpt2", "gptj", "llama")
COLD = "PMET_TESTS_COLD"
"""Environment variable that is set if every process is to start from nothing, as a user's does."""
WARM_PYTHON = "PMET_TESTS_WARM_PYTHON"
"""Environment variable that names the program of `tests.warm_python`."""
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable from which Ray reads what a job's workers run in."""
_FOLDER = pytest.StashKey["TemporaryDirectory[str]"]()

# One thread: sums have one order, and parallel tests do not compete for the cores.
torch.set_num_threads(1)
logging.disable_progress_bar()
# The modules imported above hold a million objects, which never become garbage: searching them
# again and again takes a sixth of the time of all tests.
gc.freeze()
gc.set_threshold(50_000, 20, 100)


# The slowest files, slowest first: a long file that starts last leaves the other process idle.
LONGEST = (
    "e2e/test_two_hosts.py",
    "e2e/test_submit.py",
    "test_docs.py",
    "parity/test_families.py",
    "e2e/test_chaos.py",
    "parity/test_golden.py",
    "e2e/test_signals.py",
    "pipeline/cluster/test_rank_group.py",
    "parity/test_counterfact.py",
    "pipeline/cluster/test_worker_pool.py",
    "pipeline/zero/test_rank.py",
    "e2e/test_own_files.py",
    "jobs/tune/test_tuning.py",
    "e2e/test_run.py",
    "jobs/test_failure.py",
    "e2e/test_counterfact.py",
    "e2e/test_placement.py",
    "e2e/test_refresh.py",
    "pmet/targets/test_optimization.py",
    "parity/test_other_families.py",
    "pipeline/zero/test_slices.py",
    "e2e/test_resume.py",
    "e2e/test_experts.py",
    "pipeline/second_moments/test_collection.py",
    "e2e/test_refresh_killed.py",
    "e2e/test_multimodal.py",
    "e2e/test_odd_numbers.py",
    "pipeline/stages/test_targets.py",
    "e2e/test_solves.py",
    "pipeline/estimate/test_prediction.py",
    "pipeline/edits/test_rewriting.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let Ray start its workers in a Python that has imported torch and transformers already.

    The processes that run tests inherit the variables, and so do the programs that tests start.
    """
    # A machine that runs tests is busy; Ray gives up after half a minute.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    if COLD in os.environ:
        os.environ[WARM_PYTHON] = sys.executable
    elif WARM_PYTHON not in os.environ:
        # Kept, and with it the folder, until the end of all tests.
        config.stash[_FOLDER] = folder = TemporaryDirectory()
        program = executable(Path(folder.name))
        os.environ[WARM_PYTHON] = str(program)
        os.environ[RAY_JOB] = json.dumps({"runtime_env": {"py_executable": str(program)}})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others keep their order."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@dataclass(frozen=True)
class Golden:
    """A model, a problem, and the published implementation's results for it."""

    family: str
    model: nn.Module
    tokenizer: Any
    requests: list[EditRequest]
    hparams: PMETHyperParams
    context_templates: list[list[str]]
    second_moments: dict[int, Tensor]
    expected: dict[str, Tensor]

    @property
    def expected_deltas(self) -> dict[str, Tensor]:
        """Deltas by parameter name."""
        prefix = "delta."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.expected.items()
            if name.startswith(prefix)
        }


def load(folder: Path, requests: list[EditRequest]) -> Golden:
    """Read one folder of golden numbers."""
    hparams = PMETHyperParams.from_file(folder / "hparams.json")
    module = str(hparams.down_projection_template)
    moments = load_file(folder / "second_moments.safetensors")
    return Golden(
        family=folder.name,
        model=AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        requests=requests,
        hparams=hparams,
        context_templates=json.loads((folder / "context_templates.json").read_text("utf-8")),
        second_moments={layer: moments[module.format(layer)] for layer in hparams.layers},
        expected=load_file(folder / "expected.safetensors"),
    )


@cache
def load_golden(family: str) -> Golden:
    """The golden numbers of one family; the model is shared, so tests must undo their edits."""
    rows = json.loads((GOLDEN / family / "requests.json").read_text("utf-8"))
    requests = [
        EditRequest(row["prompt"], row["subject"], row["target_new"]["str"], case_id=row["case_id"])
        for row in rows
    ]
    return load(GOLDEN / family, requests)


@pytest.fixture(scope="session", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden numbers of each family in turn."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def load_numbers() -> Callable[[Path, list[EditRequest]], Golden]:
    """Reads a folder of expected numbers with the layout of the golden ones."""
    return load


@pytest.fixture(scope="session")
def golden_tokenizer() -> Any:
    """The byte-level tokenizer of 700 tokens that the golden models share."""
    return load_golden("gpt2").tokenizer


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for data sets of tasks, instead of the user's."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def counterfact_folder() -> Path:
    """Folder of the CounterFact model and its numbers, beside the checkout."""
    if not (COUNTERFACT / "expected.safetensors").is_file():
        pytest.skip("the CounterFact model is not at ../shared/counterfact beside the checkout")
    return COUNTERFACT


@pytest.fixture(scope="session")
def ray_of_process() -> Iterator[ExitStack]:
    """Holds the Ray session of this test process, if there is one."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def warm_python() -> str:
    """A program to start instead of ``python``: it has imported torch and others already."""
    return os.environ[WARM_PYTHON]


@pytest.fixture
def cold_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a user's processes do from the start: none of them is forked."""
    monkeypatch.delenv(RAY_JOB, raising=False)


@pytest.fixture(scope="module")
def local_ray(ray_of_process: ExitStack) -> None:
    """A Ray session of this process, with logical CPUs for three workers and three ranks.

    It stays open after the file, for the next one that needs it.
    """
    # Imported here: most tests do without.
    import ray

    from pipeline.cluster.session import ray_session

    if not ray.is_initialized():
        ray_of_process.enter_context(ray_session("local", num_cpus=8))


@pytest.fixture(scope="module")
def no_ray(ray_of_process: ExitStack) -> None:
    """No open Ray session: for files that start their own or check that none is started."""
    ray_of_process.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on the loopback interface."""
    # Imported here, as in other tests: worker processes that use a class of a test import this.
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in a new bucket."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/runs/1"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def any_url(request: pytest.FixtureRequest) -> str:
    """A folder on each kind of storage in turn."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "run")
    return f"memory://{uuid.uuid4().hex}/run"
