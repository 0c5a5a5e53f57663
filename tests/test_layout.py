"""Conventions of the code base: the direction of imports, and the names that packages export."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pmet
from pipeline.job.config import load_job
from pmet import errors
from tests.conftest import ROOT

PACKAGES = ("pmet", "pipeline", "jobs")
ALLOWED = {"pmet": set(), "pipeline": {"pmet"}, "jobs": {"pipeline", "pmet"}}
UNKNOWN_TO_PMET = {"ray", "pyarrow", "deepspeed", "fsspec"}


def imported(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(PACKAGES) - ALLOWED[package] - {package}
    if package == "pmet":
        forbidden |= UNKNOWN_TO_PMET
    files = list((ROOT / package).rglob("*.py"))
    assert files
    found = {(str(f), name) for f in files for name in imported(f) if name in forbidden}
    assert not found


def test_everything_offered_exists_and_errors_share_a_root() -> None:
    assert sorted(pmet.__all__) == pmet.__all__
    for name in pmet.__all__:
        assert getattr(pmet, name).__doc__
    offered = [getattr(errors, name) for name in dir(errors) if name.endswith("Error")]
    assert all(issubclass(error, errors.PMETError) for error in offered)


def test_tests_stand_where_their_source_stands() -> None:
    """A renamed module renames its tests."""
    exempt = {"test_demo_world"}
    for package in PACKAGES:
        tests = ROOT / "tests" / package
        for test in tests.rglob("test_*.py"):
            folder = ROOT / package / test.parent.relative_to(tests)
            name = test.stem.removeprefix("test_")
            assert test.stem in exempt or (folder / f"{name}.py").exists(), test


def test_the_example_job_is_a_job() -> None:
    assert load_job(ROOT / "examples" / "nightly.yaml").update.ranks == 4
