"""Every command, with a fault at its start, in its middle and at its end: one message, no
traceback.

The commands are found by walking the command line. A new command needs a line in `ARGUMENTS`.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from rich.console import Console

import pipeline.run
from jobs.cli import app
from jobs.schedule.book import Book
from jobs.submit.server import JobServer
from jobs.submit.submission import OUTPUT, stem_of
from pipeline.edits import apply_edit
from pipeline.errors import StorageError
from pipeline.run import RunResult
from pipeline.stages.context import Context
from pmet.errors import RequestError
from tests.conftest import GOLDEN
from tests.jobs.conftest import Invoke
from tests.jobs.schedule.conftest import schedule
from tests.jobs.test_facts_cli import NEW, OLD, TEMPLATES, parquet
from tests.jobs.test_refresh_cli import refresh_home
from tests.jobs.test_reports import two_runs
from tests.saved_edits import names_of, published_run, save_edit

MODEL = GOLDEN / "gpt2" / "model"
HPARAMS = GOLDEN / "gpt2" / "hparams.json"
SUBMITTED = f"{stem_of('s3://runs/tonight')}-1"

# They run in a folder with the files written by `world`.
ARGUMENTS = {
    "apply": f"edit.safetensors {MODEL} --output applied",
    "export": "edited-run --format adapter --output exported",
    "push": "edited-run pushed",
    "revert": "edit.safetensors edited --output reverted",
    "demo": "--output out",
    "run": "job.yaml",
    "evaluate": f"{MODEL} requests.parquet --corpus corpus.parquet --output figures.json",
    "inspect": f"{MODEL} known.parquet --output inspected --hparams quick.yaml --workers 0",
    "statistics": f"{MODEL} corpus.parquet --output moments --layers 0 --tokens 600 --workers 0",
    "report": "a b --output compare.html",
    # No time: one trial in each rung, so that every run takes the same steps.
    "tune": "job.yaml --output tuned --budget 0.001s --set requests=many.parquet "
    "--set targets.workers=0 --set update.ranks=0",
    "refresh": "refresh.yaml --date 2026-11-03",
    "rollback": "home",
    "versions": "home",
    "submit": "remote.yaml --address http://head:8265 --follow",
    "status": f"{SUBMITTED} --address http://head:8265",
    "logs": f"{SUBMITTED} --address http://head:8265 --follow",
    "stop": f"{SUBMITTED} --address http://head:8265",
    "list": "--address http://head:8265",
    "facts convert": "new.parquet to.parquet --templates t.yaml",
    "facts check": "old.parquet --templates t.yaml",
    "facts diff": "old.parquet new.parquet --output diff.parquet",
    "facts retract": "home --subject Lyon --relation country",
    "facts restore": "home --subject Lyon --relation country",
    "facts ledger": "home",
    "schedule add": "other refresh.yaml",
    "schedule list": "",
    "schedule log": "facts",
    "schedule remove": "facts",
    "schedule enable": "facts",
    "schedule disable": "facts",
    "schedule run": "--once",
    "schedule systemd": "facts --output units",
    "schedule kubernetes": "facts --image registry/pmet:1",
}


class FullError(OSError):
    """The system's error for a full disk."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")


# What options take that do not take any text.
ALLOWED = {"--format": "delta"}


FAULTS: dict[str, tuple[Callable[[], BaseException], int, str]] = {
    "a full disk": (FullError, 1, "No space left on device: /a/file; make room there"),
    "a refused file": (lambda: PermissionError(errno.EACCES, "No", "/a"), 1, "failed: No: /a"),
    "a bug": (lambda: RuntimeError("a\nbug"), 1, "failed unexpectedly: RuntimeError: a bug."),
    "an error without text": (AssertionError, 1, "failed unexpectedly: AssertionError. This is"),
    "memory": (MemoryError, 1, "ran out of memory (MemoryError)"),
    "recursion": (lambda: RecursionError("too deep"), 1, "RecursionError: too deep"),
    "a character": (
        lambda: UnicodeEncodeError("ascii", "é", 0, 1, "not in range"),
        1,
        "UnicodeEncodeError: 'ascii' codec can't encode",
    ),
    "a closed socket": (lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),
    "the storage": (lambda: StorageError("cannot read x; wait"), 1, "pmet: cannot read x; wait"),
    "bad input": (lambda: RequestError("no subject; name one"), 2, "pmet: no subject; name one"),
    "the end of input": (EOFError, 1, "EOFError"),
    "Ctrl-C": (KeyboardInterrupt, 130, "interrupted; "),
}
MIDDLE = ("a full disk", "a bug", "Ctrl-C")


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all commands of ``pmet`` with their names on the command line."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


COMMANDS = dict(commands())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write files for all commands."""
    folder = tmp_path_factory.mktemp("template")
    rows = [
        {"prompt": "{} works as", "subject": "Sur Bavov", "target_new": t, "target_true": "a cook"}
        for t in ("a glass blower",)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    known = [{**rows[0], "target_true": "a surveyor"}]
    pq.write_table(pa.Table.from_pylist(known), folder / "known.parquet")
    (folder / "quick.yaml").write_text("layers: [0]\nv_num_grad_steps: 1\n")
    many = [{**rows[0], "subject": f"Sur Bavov {number}"} for number in range(8)]
    pq.write_table(pa.Table.from_pylist(many), folder / "many.parquet")
    texts = json.loads((GOLDEN / "corpus.json").read_text())[:90]
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")
    (folder / "old.parquet").write_bytes(parquet(OLD))
    (folder / "new.parquet").write_bytes(parquet(NEW))
    (folder / "t.yaml").write_text(TEMPLATES)
    refresh_home(folder / "home")
    two_runs(folder)
    edit = save_edit(MODEL, names_of("gpt2"), folder / "edit.safetensors")
    apply_edit(str(edit), str(MODEL), str(folder / "edited"))
    published_run(folder / "edited-run")
    now = datetime.now(UTC)
    book = Book(str(folder / "schedules"))
    book.add(schedule(refresh=str(folder / "refresh.yaml"), added_at=now, since=now))
    common = {"model": str(MODEL), "hparams": str(HPARAMS), "corpus": "corpus.parquet"}
    files = {
        "job": {**common, "requests": "requests.parquet", "output": "out"},
        "refresh": {**common, "facts": "old.parquet", "templates": "t.yaml", "home": "new"},
        "remote": {
            "model": "gpt2",
            "requests": "s3://facts/*.parquet",
            "output": "s3://runs/tonight",
            "hparams": "gpt-j-6b",
            "second_moments": "s3://moments",
        },
    }
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Changes to a working folder with files for all commands, without Ray or a cluster."""
    monkeypatch.setenv("PMET_SCHEDULES", "schedules")
    monkeypatch.delenv("PMET_TRACEBACK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline.run, "_run_stages", stages)
    monkeypatch.setattr(JobServer, "at", lambda address: Server())
    # Reading the demo's own corpus takes seconds, each time.
    corpus = template / "corpus.parquet"
    monkeypatch.setattr("jobs.demo.show.write_corpus", lambda path: shutil.copyfile(corpus, path))
    # So does drawing.
    monkeypatch.setattr("jobs.inspect.views.line_chart", lambda *_, **__: "")
    made = iter(range(1000))

    def make() -> Path:
        folder = tmp_path / f"world{next(made)}"
        shutil.copytree(template, folder)
        monkeypatch.chdir(folder)
        return folder

    return make


def stages(run: Context) -> RunResult:
    """Stages that write the files other code reads, and compute nothing."""
    figures = dict.fromkeys(("efficacy", "generalization", "specificity"), 1.0)
    figures |= {f"{name}_strict": 1.0 for name in figures} | {"score": 1.0}
    rows = [
        {
            **run.plan.table.table.slice(row, 1).to_pylist()[0],
            **{f"{when}_answer": "a cook." for when in ("before", "after")},
            **{"row": row, "after_efficacy": 1.0, "after_efficacy_strict": 1.0},
        }
        for row in run.plan.table.rows
    ]
    metrics = {
        **{"before": figures, "after": figures, "gates": []},
        "counts": {"requested": len(rows), "rejected": 0, "edited": len(rows)},
    }
    with run.progress.stage("targets"):
        run.store.write_table("results.parquet", pa.Table.from_pylist(rows))
        run.store.write_table("rejected.parquet", run.plan.table.rejected_table())
    run.store.write_json("context_templates.json", [["{}"]])
    run.store.write_json("metrics.json", metrics)
    run.folder.finish("complete")
    return RunResult("complete", run.store, metrics)


class Server:
    """A cluster on which every submission has ended."""

    address = "http://head:8265"

    def jobs(self) -> list[Any]:
        return [self.find(SUBMITTED)]

    def find(self, name: str) -> Any:
        return SimpleNamespace(
            submission_id=name,
            metadata={OUTPUT: "s3://runs/tonight"},
            status="SUCCEEDED",
            driver_exit_code=None,
            message=None,
            start_time=0,
        )

    def submit(self, *_: Any, **__: Any) -> bool:
        return True

    def follow(self, name: str, say: Callable[[str], None], shown: int = 0) -> int:
        say("a line\n")
        return 7


class Seam:
    """Counts a command's file operations in its folder and its writes to the terminal; fails once.

    Args:
        at: number of the operation that fails; None: none fails.
    """

    OTHERS = ("replace", "link", "scandir", "listdir")

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.done = str(folder), 0
        self.at: int | None = None
        self.error: Callable[[], BaseException] = RuntimeError
        for module, name in [(builtins, "open"), (io, "open"), *((os, n) for n in self.OTHERS)]:
            self._watch(patch, module, name, self._on_file)
        self._watch(patch, Console, "print", lambda *_, **__: self._count())
        self._watch(patch, typer, "echo", lambda *_, **__: self._count())

    def _watch(self, patch: pytest.MonkeyPatch, where: Any, name: str, look: Any) -> None:
        original = getattr(where, name)

        def watched(*args: Any, **options: Any) -> Any:
            look(*args, **options)
            return original(*args, **options)

        patch.setattr(where, name, watched)

    def _on_file(self, file: Any = ".", *_: Any, **__: Any) -> None:
        if isinstance(file, int) or threading.current_thread() is not threading.main_thread():
            return
        path = os.path.join(os.getcwd(), os.fsdecode(file))
        # A lease that cannot be released expires, which is no failure of the command. The other
        # path is a placeholder on sys.path in an editable installation, and no file.
        if path.startswith(self.folder) and "/lease/" not in path and "__path_hook__" not in path:
            self._count()

    def _count(self) -> None:
        self.done += 1
        if self.done == self.at:
            raise self.error()


def required(command: Any) -> Iterator[str]:
    """Return arguments that satisfy a command's parser."""
    for parameter in command.params:
        if parameter.required:
            if parameter.param_type_name == "option":
                yield parameter.opts[0]
            yield ALLOWED.get(parameter.opts[0], "x")


def said(out: str, err: str) -> str:
    """Return the one message that a command ends with."""
    assert "Traceback" not in out + err
    assert "Exception ignored" not in out + err
    # A progress bar whose own output failed leaves its line open.
    (sentence,) = (
        line for line in err.splitlines() if re.search("(^|  )(pmet|interrupted)[:;] ", line)
    )
    return sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_at_its_start_is_a_sentence(
    pmet: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    group = typer.main.get_command(app)
    command = dict(commands(group))[name]
    monkeypatch.setattr("typer.main.get_command", lambda _: group)
    for error, status, text in FAULTS.values():

        def broken(error: Callable[[], BaseException] = error, **_: Any) -> None:
            raise error()

        monkeypatch.setattr(command, "callback", broken)
        found, out, err = pmet(*name.split(), *required(command))
        assert (found, text in said(out, err)) == (status, True), err
        # Unexpected errors keep their traceback; expected ones have none.
        kept = [file.read_text() for file in tmp_path.glob("pmet-traceback-*.txt")]
        assert len(kept) == (status == 1 and not text.startswith("pmet: "))
        for file in tmp_path.glob("pmet-traceback-*.txt"):
            assert f"(traceback: {file})" in err
            file.unlink()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_on_its_way_is_a_sentence(
    pmet: Invoke, world: Callable[[], Path], name: str
) -> None:
    arguments = [*name.split(), *ARGUMENTS[name].split()]

    def run(at: int | None, fault: str) -> tuple[int, str, str, int]:
        with pytest.MonkeyPatch.context() as patch:
            seam = Seam(patch, world())
            seam.at, seam.error = at, FAULTS[fault][0]
            return *pmet(*arguments), seam.done

    status, _, err, steps = run(None, "a bug")
    assert (status, steps > 0) == (0, True), err
    for at in ((steps + 1) // 2, steps):
        for fault in MIDDLE:
            # Some faults are harmless (a file need not be deleted); then an earlier one is not.
            tried = (run(step, fault) for step in range(at, max(0, at - 4), -1))
            status, out, err, _ = next(result for result in tried if result[0])
            assert status == 130 if fault == "Ctrl-C" else status in (1, 2), (at, fault, err)
            # An unreadable file is one of the findings of a check.
            assert "rows can be used" in out if status == 2 and not err else said(out, err)
