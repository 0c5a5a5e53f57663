"""The container image: what its steps install and copy is there, and it is not root's."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.conftest import ROOT

TEXT = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The instructions and their arguments, comments and line breaks removed."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(k, v) for k, _, v in (line.partition(" ") for line in joined.splitlines()) if k]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def defaults(steps: list[tuple[str, str]]) -> dict[str, str]:
    return dict(value.split("=", 1) for kind, value in steps if kind == "ARG")


def test_it_runs_pmet_and_not_as_root(steps: list[tuple[str, str]]) -> None:
    last = max(i for i, (kind, _) in enumerate(steps) if kind == "FROM")
    final = steps[last:]
    (user,) = [value for kind, value in final if kind == "USER"]
    assert int(user) > 0
    assert any(f"useradd --uid {user} " in value for kind, value in final if kind == "RUN")
    assert ("ENTRYPOINT", '["pmet"]') in final
    assert not any("pip install" in value for _, value in final)


def test_what_is_copied_is_there_and_not_ignored(
    steps: list[tuple[str, str]], project: dict[str, Any]
) -> None:
    sources = [
        source
        for kind, value in steps
        if kind == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    ]
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)
    # What the build of the package reads.
    wanted = [project["readme"], *project["license-files"], "pyproject.toml"]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wanted += [name.rstrip("*") for name in packages["packages"]["find"]["include"]]
    assert set(wanted) <= allowed
    assert any(fnmatch("jobs/__pycache__", rule) for rule in rules)


def test_versions_are_within_the_bounds_of_the_project(
    steps: list[tuple[str, str]], project: dict[str, Any]
) -> None:
    given = defaults(steps)
    assert set(given["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    bounds = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    assert given["RAY"] in bounds["ray"]
    assert f"{given['PYTHON']}.0" in Requirement(f"x{project['requires-python']}").specifier
    documents = yaml.safe_load_all((ROOT / "examples" / "rayjob.yaml").read_text())
    job = {document["kind"]: document for document in documents}["RayJob"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == given["RAY"]


def test_torch_is_installed_as_the_project_bounds_it(
    steps: list[tuple[str, str]], capsys: pytest.CaptureFixture[str], project: dict[str, Any]
) -> None:
    (install,) = [value for kind, value in steps if kind == "RUN" and "torch.txt" in value]
    (program,) = re.findall(r'python -c "(.*?)" > torch.txt', install)
    exec(program.replace("pyproject.toml", str(ROOT / "pyproject.toml")), {})
    (bound,) = [d for d in project["dependencies"] if d.startswith("torch>")]
    assert capsys.readouterr().out == f"{bound}\n"


def test_both_variants_are_images_that_the_kubernetes_example_uses(
    steps: list[tuple[str, str]],
) -> None:
    assert defaults(steps)["TORCH"] == "cpu"
    tags = set(re.findall(r"docker build --tag (\S+)", TEXT))
    assert len(tags) == 2
    used = set(re.findall(r"image: (\S+)", (ROOT / "examples" / "rayjob.yaml").read_text()))
    assert used <= tags
