"""A job whose driver is killed again and again ends as an undisturbed one.

``PMET_CHAOS_KILLS`` says how often it is killed, ``PMET_CHAOS_SEED`` draws when.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import dump_job
from pipeline.store import Store
from tests.conftest import ROOT
from tests.e2e.conftest import job, targets_by_row

KILLS = int(os.environ.get("PMET_CHAOS_KILLS", "1"))
SEED = int(os.environ.get("PMET_CHAOS_SEED", "0"))
FINISHED, KILLED = 0, -signal.SIGKILL

# The driver: dies after a time, or in the middle of or right after the n-th file that it writes.
DRIVER = """
import os, signal, sys, threading, time
from contextlib import contextmanager
from pipeline.config import load_job
from pipeline.run import run_job
from pipeline.store import Store

kind, when = sys.argv[2], float(sys.argv[3])
written, start, write_stream = 0, time.monotonic(), Store.write_stream

def die():
    os.kill(os.getpid(), signal.SIGKILL)

@contextmanager
def counted(self, name):
    global written
    written += 1
    number = written
    with write_stream(self, name) as stream:
        yield stream
        if kind == "inside" and number == when:
            stream.flush()
            die()
    if kind == "after" and number == when:
        die()

Store.write_stream = counted
if kind == "time":
    timer = threading.Timer(when, die)
    timer.daemon = True
    timer.start()
run_job(load_job(sys.argv[1]))
print(written, time.monotonic() - start)
"""


def drive(file: Path, kind: str, when: float) -> tuple[int, str]:
    """Run a job until it ends or dies; returns the exit status and what was printed."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(file), kind, str(when)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


def job_file(folder: Path, inputs: Path) -> Path:
    settings = job(
        inputs,
        str(folder / "out"),
        targets={"workers": 1, "shard_size": 8},
        update={"ranks": 1},
        evaluate={"sample": 8},
    )
    folder.mkdir()
    (folder / "job.yaml").write_text(dump_job(settings))
    return folder / "job.yaml"


def files(output: Path) -> list[str]:
    """All files, hidden ones too; without the mark of the attempt that wrote them."""
    names = [str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()]
    return sorted(re.sub(r"-[0-9a-f]{32}|\d{6}(?=\.json)", "", name) for name in names)


def stage(output: Path) -> str:
    """Where a killed run was."""
    said = Store(output).read_json("run.json") if (output / "run.json").exists() else {}
    return str(said.get("stage") or "between two stages")


def assert_as_undisturbed(undisturbed: Path, output: Path) -> None:
    """The same files, targets to the bit, weights, scores; nothing that an attempt has left."""
    assert files(output) == files(undisturbed)
    expected, values = (targets_by_row(Store(folder)) for folder in (undisturbed, output))
    assert expected.keys() == values.keys()
    assert all(np.array_equal(expected[r].view(np.int32), values[r].view(np.int32)) for r in values)
    weights, others = (
        load_file(folder / "model" / "model.safetensors") for folder in (undisturbed, output)
    )
    for name, weight in weights.items():
        apart = torch.linalg.norm(weight - others[name])
        assert apart <= 1e-6 * torch.linalg.norm(weight), name
    metrics, again = (
        json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed, output)
    )
    assert again["counts"] == metrics["counts"]
    assert again["after"] == pytest.approx(metrics["after"], rel=1e-4)
    assert json.loads((output / "run.json").read_text())["status"] == "complete"


@pytest.mark.slow
@pytest.mark.timeout(240 + 120 * KILLS)
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    inputs: Path, tmp_path: Path
) -> None:
    status, said = drive(job_file(tmp_path / "undisturbed", inputs), "never", 0)
    assert status == FINISHED, said
    written, seconds = said.split()[-2:]
    draw, deaths, file = random.Random(SEED), [], None
    while len(deaths) < KILLS:
        file = file or job_file(tmp_path / f"killed-{len(list(tmp_path.iterdir()))}", inputs)
        kind = draw.choice(["inside", "after", "time"])
        when = draw.uniform(1, float(seconds)) if kind == "time" else draw.randint(1, int(written))
        status, said = drive(file, kind, when)
        assert status in (KILLED, FINISHED), said
        if status == KILLED:
            deaths.append(f"{kind} {when:.0f}, {stage(file.parent / 'out')}")
        else:
            # It had less left to do than that: another one is killed.
            assert_as_undisturbed(tmp_path / "undisturbed" / "out", file.parent / "out")
            file = None
    if file is not None:
        status, said = drive(file, "never", 0)
        assert status == FINISHED, said
        assert_as_undisturbed(tmp_path / "undisturbed" / "out", file.parent / "out")
    (tmp_path / "deaths.txt").write_text("\n".join([*deaths, f"{written} writes, {seconds} s"]))
