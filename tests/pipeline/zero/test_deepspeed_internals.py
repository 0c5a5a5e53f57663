"""The private names of DeepSpeed that are used exist in the DeepSpeed that is installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.zero.deepspeed_internals import NAMES
from tests.conftest import ROOT
from tests.internals import assert_has

WHERE = "pipeline/zero/deepspeed_internals.py"
# In a process of its own: DeepSpeed reads the environment, and has a process group for good.
LOOK = """
import json, socket, sys
import torch
from torch import nn
from pipeline.zero.deepspeed_internals import partition
from pipeline.zero.loading import zero_config
from pipeline.zero.slices import deepspeed, init_rank
from tests.internals import exists

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
init_rank(0, 1, "127.0.0.1", port, device="cpu", timeout_s=60.0)
init = deepspeed().zero.Init(config_dict_or_path=zero_config(torch.float32))
parameter = nn.Parameter(torch.ones(3, 5))
try:
    partition(init, parameter)
except AttributeError as error:
    print(error, file=sys.stderr)
objects = {"Parameter": parameter, "Init": init}

def has(name):
    kind, _, attribute = name.partition(".")
    return hasattr(objects[kind], attribute) if kind in objects else exists(name)

print(json.dumps({name: has(name) for name in json.loads(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, bool]:
    """By private name whether DeepSpeed has it."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(list(NAMES))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return names


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_has_the_name(name: str, found: dict[str, bool]) -> None:
    assert_has(found[name], name, NAMES, "deepspeed", WHERE)
