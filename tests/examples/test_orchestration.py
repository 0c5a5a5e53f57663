"""Examples for schedulers: what each exit status leads to, with stand-ins for their libraries.

The libraries are large, and each brings a server; what the examples use of them is a few names.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer

from jobs.cli import app
from pipeline.job import parse_yaml
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
RUN = {"status": "complete", "digest": "0a1b", "counts": {"edited": 40}, "error": None}

# Notes how it was called; `versions` names the model in use, other commands end as the test says.
PMET = """\
#!/bin/sh
printf '%s\\n' "$*" >> calls
if [ "$1" = versions ]; then echo "$PWD/home/versions/0007/model"; exit 0; fi
[ ! -s statuses ] && exit 0
status=$(head -n 1 statuses)
sed -i 1d statuses
exit "$status"
"""


class Pmet:
    """A command `pmet` that ends with given statuses, one after the other, and then with 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("pmet", PMET), ("sleep", "#!/bin/sh\n")):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        for run in ("home/versions/0007", "runs/2026-11-28"):
            (folder / run).mkdir(parents=True)
            (folder / run / "run.json").write_text(json.dumps(RUN))

    def ends(self, *statuses: int) -> None:
        (self.folder / "calls").unlink(missing_ok=True)
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))

    def calls(self) -> list[str]:
        """The calls since, each of which the real command line can read."""
        lines = (self.folder / "calls").read_text().splitlines()
        for line in lines:
            read_as_pmet(line.split())
        return lines


def read_as_pmet(arguments: list[str]) -> None:
    """Parse arguments as `pmet` does, without running the command."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)


def test_arguments_that_pmet_does_not_take_are_noticed() -> None:
    read_as_pmet(["run", "job.yaml", "--set", "seed=1"])
    with pytest.raises(Exception, match="No such option"):
        read_as_pmet(["run", "job.yaml", "--sets", "seed=1"])


@pytest.fixture
def pmet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pmet:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"PMET_HOME": "home", "PMET_RUNS": "runs", "PMET_HUB": "hf://a/b"}.items():
        monkeypatch.setenv(name, value)
    return Pmet(tmp_path)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Imports an example with stand-ins for the modules that it imports."""

    def load(name: str, **standins: ModuleType) -> ModuleType:
        for module, standin in standins.items():
            monkeypatch.setitem(sys.modules, module.replace("__", "."), standin)
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def module(**names: Any) -> ModuleType:
    made = ModuleType("standin")
    vars(made).update(names)
    return made


class FailError(Exception):
    """The exception of Airflow that is not retried."""


@pytest.fixture
def airflow(example: Callable[..., ModuleType]) -> SimpleNamespace:
    """The Airflow example: its module, its tasks by name, and their and the DAG's options."""
    tasks: dict[str, Callable[..., Any]] = {}
    options: dict[str, dict[str, Any]] = {}

    def task(**given: Any) -> Callable[..., Any]:
        def made(function: Callable[..., Any]) -> Callable[..., Any]:
            # Airflow fills these in, and accepts no other default.
            assert {p.default for p in signature(function).parameters.values()} <= {
                None,
                Parameter.empty,
            }
            tasks[function.__name__], options[function.__name__] = function, given
            return lambda *_: None

        return made

    def dag(**given: Any) -> Callable[..., Any]:
        options["dag"] = given
        return lambda function: function

    sdk = module(dag=dag, task=task)
    exceptions = module(AirflowFailException=FailError)
    loaded = example(
        "airflow_dag",
        airflow=module(),
        airflow__sdk=sdk,
        airflow__sdk__exceptions=exceptions,
    )
    return SimpleNamespace(module=loaded, tasks=tasks, options=options)


def test_airflow_refreshes_and_pushes_the_version_in_use(
    pmet: Pmet, airflow: SimpleNamespace
) -> None:
    version = airflow.tasks["refresh"](ds="2026-11-28")
    folder = pmet.folder / "home" / "versions" / "0007"
    assert version == {"model": f"{folder}/model", "digest": "0a1b", "counts": {"edited": 40}}
    airflow.tasks["push"](version)
    assert pmet.calls() == [
        "refresh /etc/pmet/refresh.yaml --date 2026-11-28",
        "versions home --current",
        f"push {folder} hf://a/b",
    ]
    assert not airflow.options["dag"]["catchup"]
    assert airflow.options["dag"]["max_active_runs"] == 1


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (2, FailError, "pmet refresh: bad input: the log says what to change"),
        (3, FailError, "pmet refresh: a gate held the new version back: see its report"),
        (1, RuntimeError, "pmet refresh ended with 1; a retry resumes it"),
        (143, RuntimeError, "pmet refresh ended with 143; a retry resumes it"),
    ],
)
def test_airflow_retries_only_what_may_succeed(
    pmet: Pmet, airflow: SimpleNamespace, status: int, kind: type[Exception], text: str
) -> None:
    pmet.ends(status)
    with pytest.raises(kind, match=f"^{text}"):
        airflow.tasks["refresh"]()
    assert pmet.calls() == ["refresh /etc/pmet/refresh.yaml"]
    assert airflow.options["refresh"]["retries"] == 3


def test_airflow_tells_people_of_a_failure(
    airflow: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    tell = airflow.options["dag"]["default_args"]["on_failure_callback"]
    tell({"exception": FailError("a gate held it back")})
    assert caplog.messages == ["tell people: a gate held it back"]


class FailureError(Exception):
    """The exception of Dagster that ends a step."""

    def __init__(self, text: str, *, metadata: dict[str, str], allow_retries: bool) -> None:
        super().__init__(text)
        self.metadata, self.allow_retries = metadata, allow_retries


class RetryError(Exception):
    """The exception of Dagster that asks for a retry."""

    def __init__(self, *, max_retries: int, seconds_to_wait: float) -> None:
        self.times = (max_retries, seconds_to_wait)


@pytest.fixture
def dagster(example: Callable[..., ModuleType]) -> ModuleType:
    standin = module(
        DailyPartitionsDefinition=SimpleNamespace,
        AssetExecutionContext=object,
        MaterializeResult=SimpleNamespace,
        MetadataValue=SimpleNamespace(int=int),
        Failure=FailureError,
        RetryRequested=RetryError,
        Definitions=SimpleNamespace,
        asset=lambda **_: lambda function: function,
        define_asset_job=lambda *given: given,
        build_schedule_from_partitioned_job=lambda job, **when: (job, when),
    )
    return example("dagster_job", dagster=standin)


def test_dagster_runs_a_job_for_a_day(pmet: Pmet, dagster: ModuleType) -> None:
    result = dagster.edited_model(SimpleNamespace(partition_key="2026-11-28"))
    assert result.metadata == {"digest": "0a1b", "edited": 40}
    assert pmet.calls() == [
        "run /etc/pmet/job.yaml --log-lines --set output=runs/2026-11-28 "
        "--set requests=s3://facts/2026-11-28/*.parquet"
    ]


def test_dagster_retries_only_what_may_succeed(pmet: Pmet, dagster: ModuleType) -> None:
    for status, text in ((2, "pmet: bad input"), (3, "pmet: a gate held the model back")):
        pmet.ends(status)
        with pytest.raises(FailureError, match=f"^{text}") as caught:
            dagster.edited("2026-11-28")
        assert not caught.value.allow_retries
        assert caught.value.metadata["run"] == "runs/2026-11-28"
    # What the run itself says comes first; a job refused at once leaves no run.
    run = pmet.folder / "runs" / "2026-11-28" / "run.json"
    run.write_text(json.dumps(RUN | {"status": "failed", "error": "no request can be edited"}))
    for day, error in (("2026-11-28", "no request"), ("2026-11-27", "bad input")):
        pmet.ends(2)
        with pytest.raises(FailureError) as caught:
            dagster.edited(day)
        assert caught.value.metadata["error"].startswith(error)
    pmet.ends(1)
    with pytest.raises(RetryError) as again:
        dagster.edited("2026-11-28")
    assert again.value.times == (3, 300)


@pytest.fixture
def prefect(example: Callable[..., ModuleType]) -> ModuleType:
    def decorator(**options: Any) -> Callable[..., Any]:
        def made(function: Any) -> Any:
            function.options = options
            return function

        return made

    standin = module(
        flow=decorator, task=decorator, get_run_logger=lambda: logging.getLogger("prefect")
    )
    return example("prefect_flow", prefect=standin)


def test_prefect_refreshes_and_pushes_the_version_in_use(pmet: Pmet, prefect: ModuleType) -> None:
    folder = str(pmet.folder / "home" / "versions" / "0007")
    assert prefect.pmet_nightly() == {"run": folder, "counts": {"edited": 40}}
    assert pmet.calls() == [
        "refresh /etc/pmet/refresh.yaml",
        "versions home --current",
        f"push {folder} hf://a/b",
    ]


@pytest.mark.parametrize(("status", "again"), [(1, True), (2, False), (3, False), (143, True)])
def test_prefect_retries_only_what_may_succeed(
    pmet: Pmet, prefect: ModuleType, status: int, again: bool
) -> None:
    for task in (prefect.refresh, lambda: prefect.push("run")):
        pmet.ends(status)
        with pytest.raises((prefect.FinalError, RuntimeError)):
            task()
        pmet.ends(status)
        assert prefect.may_succeed(None, None, SimpleNamespace(result=task)) is again
    for task in (prefect.refresh, prefect.push):
        assert task.options["retry_condition_fn"] is prefect.may_succeed


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return dict(parse_yaml((EXAMPLES / "github-actions.yaml").read_text()))


def steps(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in workflow["jobs"]["refresh"]["steps"] if "name" in step}


def test_the_workflow_has_the_parts_that_github_reads(workflow: dict[str, Any]) -> None:
    assert set(workflow["on"]) == {"schedule", "workflow_dispatch"}
    assert workflow["concurrency"]["cancel-in-progress"] is False
    (job,) = workflow["jobs"].values()
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
    assert steps(workflow)["Push"]["env"] == {"HF_TOKEN": "${{ secrets.HF_TOKEN }}"}
    assert "HF_TOKEN" not in workflow["env"]
    for name, wanted in {"Push": "== '0'", "Held back": "== '3'", "Result": "!= '0'"}.items():
        assert steps(workflow)[name]["if"] == f"steps.refresh.outputs.status {wanted}"


def test_the_commands_of_the_workflow_are_a_shells_and_pmets(workflow: dict[str, Any]) -> None:
    found = []
    for step in steps(workflow).values():
        checked = subprocess.run(["bash", "-n", "-c", step["run"]], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        words = shlex.split(step["run"], comments=True)
        found += [(words[i + 1], words[i + 1 :]) for i, w in enumerate(words[:-1]) if w == "pmet"]
    assert [name for name, _ in found] == ["refresh", "push"]
    for name, words in found:
        read_as_pmet(words[: {"refresh": 2, "push": 3}[name]])


@pytest.mark.parametrize(
    ("ends", "status", "tries"),
    [([0], 0, 1), ([1, 0], 0, 2), ([1, 1, 1], 1, 3), ([2], 2, 1), ([3], 3, 1), ([1, 3], 3, 2)],
)
def test_the_workflow_tries_again_only_what_may_succeed(
    pmet: Pmet, workflow: dict[str, Any], ends: list[int], status: int, tries: int
) -> None:
    pmet.ends(*ends)
    environment = {**os.environ, **workflow["env"], "GITHUB_OUTPUT": "said"}
    # As GitHub calls it.
    script = ["bash", "-e", "-o", "pipefail", "-c", steps(workflow)["Refresh"]["run"]]
    subprocess.run(script, env=environment, cwd=pmet.folder, check=True)
    assert (pmet.folder / "said").read_text() == f"status={status}\n"
    assert pmet.calls() == ["refresh refresh.yaml"] * tries
