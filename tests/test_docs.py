"""The documentation: README and tutorials run as written; every command in it is one that exists.

In a page, a Python or YAML block that begins with a file's name is that file, and a shell block is
run after the blocks before it. ``<!-- not run … -->`` above a shell block says why it is only read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from transformers import AutoModelForCausalLM

from jobs.cli import app
from pipeline.job import load_job
from tests.conftest import RAY_JOB, ROOT

README = ROOT / "README.md"
TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
_BLOCK = re.compile(
    r"(?:^<!-- not run(?P<why>[^>]*)-->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_FILE = re.compile(r"# (\w[\w.-]*\.(?:py|yaml))\n")
PROSE = " ".join(README.read_text("utf-8").split())
_PLACEHOLDER = re.compile(r"\[[^]]*\]|…|\.\.\.")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        kind: ``sh``, ``python``, ``yaml`` or another.
        text: its content.
        runs: whether it is run.
    """

    kind: str
    text: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["kind"], found["text"], found["why"] is None)
        for found in _BLOCK.finditer(page.read_text("utf-8"))
    ]


def commands(text: str) -> list[list[str]]:
    """The ``pmet`` commands of a shell block, as lists of arguments."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in re.split(r"&&|\|\||[|;]", _without_comment(line)))
    words = [shlex.split(part) for part in parts]
    return [command[1:] for command in words if command[:1] == ["pmet"]]


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line)


def read(arguments: list[str]) -> None:
    """Read arguments as the command line does, and run nothing; any exception refuses them."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(command.name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_exists(page: Path) -> None:
    for block in blocks(page):
        for command in commands(block.text) if block.kind in ("sh", "bash", "console") else ():
            if any(_PLACEHOLDER.search(word) for word in command):
                # A line of usage, such as pmet apply RUN|DELTA MODEL [--force].
                continue
            read(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_job_file_is_one_that_is_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml" and block.text.startswith("# job.yaml"):
            (tmp_path / "job.yaml").write_text(block.text, "utf-8")
            load_job(tmp_path / "job.yaml")


Follow = Callable[[Path], Path]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Follow:
    """Follows a page, once; returns the folder that it leaves."""

    @cache
    def follow(page: Path) -> Path:
        name = page.stem
        work, programs = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("programs")
        environment = with_programs(programs, warm_python)
        if page == README:
            # A reader is in a clone of the project.
            (work / "jobs").mkdir()
            (work / "jobs" / "demo").symlink_to(ROOT / "jobs" / "demo")
        for block in blocks(page):
            if named := _FILE.match(block.text):
                (work / named[1]).write_text(block.text, "utf-8")
            elif block.kind == "sh" and block.runs:
                said = run(["bash", "-euo", "pipefail", "-c", block.text], work, environment)
                EXPECTED.get((name, block.text.split("\n")[0]), _anything)(said)
        return work

    return follow


def with_programs(folder: Path, python: str) -> dict[str, str]:
    """The environment of a user who has installed this checkout, and runs it with a Python.

    It is installed, so ``pip`` does nothing; and ``pytest`` is what runs these tests.
    """
    starts = {"pmet": "-m jobs", "python": "", "ray": "-m ray.scripts.scripts"}
    commands = {program: f'exec "{python}" {start} "$@"' for program, start in starts.items()}
    for program, text in (commands | {"pip": "true", "pytest": "true"}).items():
        file = folder / program
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    changed = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | changed | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a command that ends well; return its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", ["first-edit", "nightly", "real-model"])
def test_a_tutorial_runs_as_written(name: str, followed: Follow) -> None:
    followed(TUTORIALS / f"{name}.md")


@pytest.mark.slow
def test_the_readme_runs_as_written(followed: Follow) -> None:
    folder = followed(README)
    metrics = json.loads((folder / "demo-run" / "metrics.json").read_text("utf-8"))
    assert metrics["counts"] == {"requested": 200, "rejected": 0, "edited": 200}
    assert metrics["before"]["efficacy"] == metrics["before"]["efficacy_said"] == 0
    after = metrics["after"]
    assert after["efficacy"] >= 0.95
    assert after["generalization"] >= 0.85
    assert after["specificity"] >= 0.90
    shown = re.search(
        r"says ([\d.]+) % .*? and ([\d.]+) % .*? and ([\d.]+) % of their neigh", PROSE
    )
    assert shown is not None
    figures = (after[name] for name in ("efficacy_said", "generalization_said", "locality"))
    for said, figure in zip(shown.groups(), figures, strict=True):
        # Two of 200 facts: rounding differs among processors.
        assert float(said) == pytest.approx(100 * figure, abs=1)
    assert pq.read_table(folder / "demo-run" / "results.parquet").num_rows == 200
    for run_folder in ("demo-run", "runs/tonight"):
        AutoModelForCausalLM.from_pretrained(folder / run_folder / "model")


# A network and processes of its own: Ray's fixed ports, and `ray stop`, which ends all it finds.
APART = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "bash"]
ALONE = "ip link set lo up; mkdir -p /tmp/ray; mount -t tmpfs none /tmp/ray"


@pytest.mark.slow
def test_the_cluster_tutorial_runs_as_written(followed: Follow, tmp_path: Path) -> None:
    if subprocess.run([*APART, "-c", ALONE], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces for network and processes here")
    (programs := tmp_path / "programs").mkdir()
    environment = with_programs(programs, sys.executable) | {"HOME": str(tmp_path)}
    environment.pop(RAY_JOB, None)
    texts = [b.text for b in blocks(TUTORIALS / "cluster.md") if b.kind == "sh" and b.runs]
    script = "\n".join([ALONE, *texts])
    said = run(
        [*APART, "-euo", "pipefail", "-c", script],
        followed(TUTORIALS / "first-edit.md"),
        environment,
    )
    assert "SUCCEEDED, exit status 0" in said
    assert "complete, attempt 1" in said


def _anything(_: str) -> None:
    """A block whose exit status says enough."""


def _asked(said: str) -> None:
    """The model of the tutorial says what it was taught, in other words as well."""
    answers = said.splitlines()[:3]
    for answer, wanted in zip(answers, ("euro", "dollar", "Italy"), strict=True):
        assert wanted in answer, said


def _shown(said: str) -> None:
    """The demo shows the model's answers, the figures and the report."""
    for part in ("What the model says", "before", "after", "efficacy", "report.html"):
        assert part in said


EXPECTED = {
    ("first-edit", "python ask.py"): _asked,
    ("README", "pip install -e . && pmet demo"): _shown,
}


def test_a_command_that_does_not_exist_is_noticed() -> None:
    found = commands(
        "pmet run job.yaml --fast  # quick\nA=1 pmet x\npip install . && pmet nothing\n"
    )
    assert found == [["run", "job.yaml", "--fast"], ["nothing"]]
    for command in found:
        with pytest.raises(Exception, match=r"fast|nothing"):
            read(command)
