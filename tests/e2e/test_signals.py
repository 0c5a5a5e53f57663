"""Real signals sent to a run: repeated Ctrl-C, SIGTERM, the end of the terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.run_folder.lease import Lease
from pipeline.storage.store import Store
from tests.conftest import GOLDEN, ROOT

# What a forked process leaves behind is not found by its environment.
pytestmark = pytest.mark.usefixtures("cold_python")
MARK = "PMET_TEST_MARK"
GPT2 = GOLDEN / "gpt2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of a few facts, for one worker and one rank."""
    folder = tmp_path_factory.mktemp("signals")
    facts = json.loads((GOLDEN / "facts.json").read_text())[:4]
    rows = [{k: f[k] for k in ("prompt", "subject", "target_new", "target_true")} for f in facts]
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    job = {
        "model": str(GPT2 / "model"),
        "requests": "requests.parquet",
        "output": "out",
        "hparams": str(GPT2 / "hparams.json"),
        "second_moments": str(GPT2 / "second_moments.safetensors"),
        "context_templates": str(GPT2 / "context_templates.json"),
        "targets": {"workers": 1, "shard_size": 1},
        "update": {"ranks": 1},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder


def hear_signals() -> None:
    """Reset signals in a new process: under nohup or in the background, tests ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """``pmet run`` in a process group of its own, as a shell starts it.

    Args:
        folder: folder of the job.
        options: more arguments of the command.
        output: destination of its output; a pipe if None.
    """

    def __init__(self, folder: Path, *options: str, output: int = subprocess.PIPE) -> None:
        self.mark = uuid.uuid4().hex
        self._folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "run", "job.yaml", "--log-lines", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark},
            stdout=output,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=hear_signals,
            text=True,
        )
        assert self.process.stderr is not None
        self._lines: Iterator[str] = iter(self.process.stderr.readline, "")

    def stop_at(self, sign: str, numbers: Sequence[int], *, after_s: float = 0.0) -> None:
        """Send signals to the whole group once a line of its log contains all words of ``sign``."""
        for line in self._lines:
            if all(word in line for word in sign.split()):
                break
        time.sleep(after_s)
        for number in numbers:
            os.killpg(self.process.pid, number)
            time.sleep(0.2)

    def end(self) -> tuple[int, list[str], dict[str, Any]]:
        """Return the exit status, the output outside its log, and ``run.json``."""
        said = [line.strip() for line in self._lines if not line.startswith("time=")]
        status = self.process.wait(60)
        return status, said, json.loads((self._folder / "out" / "run.json").read_text())

    def left(self) -> list[str]:
        """Return the processes that it left behind, after a moment to end."""
        deadline = time.monotonic() + 20
        while (found := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _marked(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process.name())
            except psutil.Error:
                continue
        return found


STOPPED = "stopped by a signal; the same job goes on from here"


def test_the_end_of_the_terminal_while_ray_starts(folder: Path) -> None:
    run = Run(folder)
    run.stop_at("event=begin stage=targets", [signal.SIGHUP], after_s=0.5)
    status, said, record = run.end()
    assert (status, said) == (
        129,
        ["stopped by SIGHUP; run the same command again to resume"],
    )
    assert (record["status"], record["exit_status"]) == ("stopped", 129)
    assert run.left() == []


def test_ctrl_c_three_times_while_targets_are_computed(folder: Path) -> None:
    run = Run(folder)
    run.stop_at("event=shard stage=targets", [signal.SIGINT] * 3)
    status, said, record = run.end()
    assert (status, said) == (130, ["interrupted; run the same command again to resume"])
    ended = (record["status"], record["error"], record["exit_status"])
    assert ended == ("stopped", STOPPED, 130)
    assert run.left() == []
    Lease.acquire(Store(folder / "out")).release()


def test_sigterm_while_the_model_is_published_and_then_a_run_whose_reader_is_gone(
    folder: Path,
) -> None:
    run = Run(folder)
    run.stop_at("event=begin stage=publish", [signal.SIGTERM, signal.SIGINT])
    status, said, record = run.end()
    assert (status, said) == (
        143,
        ["stopped by SIGTERM; run the same command again to resume"],
    )
    assert (record["status"], record["exit_status"]) == ("stopped", 143)
    assert run.left() == []
    # The rest runs without Ray.
    reader, writer = os.pipe()
    os.close(reader)
    here = ("--set", "targets.workers=0", "--set", "update.ranks=0")
    run = Run(folder, *here, output=writer)
    os.close(writer)
    status, said, record = run.end()
    assert (status, said, record["status"]) == (0, [], "complete")
    assert [attempt["status"] for attempt in record["earlier"]] == ["stopped"] * 3
