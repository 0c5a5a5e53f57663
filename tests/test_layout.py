"""Conventions of the house, as tests: which way imports point, and what the packages offer."""

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


LIBRARIES = {"ray", "deepspeed", "transformers", "torch"}
INTERNALS = {f: f.stem.removesuffix("_internals") for f in ROOT.glob("p*/*/*_internals.py")}


def declared(file: Path) -> set[str]:
    """The private names that a module of internals says it uses: the keys of its ``NAMES``."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError(f"{file} has no NAMES")


def full_names(tree: ast.AST) -> Iterator[str]:
    """What a file imports, its attributes by their full names, its strings and its keywords."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                yield prefix + alias.name
                aliases[alias.asname or alias.name] = prefix + alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, _, rest = ast.unparse(node).partition(".")
            yield f"{aliases.get(owner, owner)}.{rest}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def hidden_parts(name: str) -> set[str]:
    """The parts of a dotted name that mark it as a library's own."""
    parts = name.split(".")
    return {p for p in parts if p.startswith(("_", "ds_")) and not p.startswith("__")}


def test_private_names_of_libraries_stand_in_one_module_each() -> None:
    assert sorted(INTERNALS.values()) == sorted(LIBRARIES)
    names = set().union(*map(declared, INTERNALS))
    attributes = set().union(*(hidden_parts(name.rpartition(".")[2]) for name in names))

    def is_private(name: str) -> bool:
        in_library = name.partition(".")[0] in LIBRARIES and hidden_parts(name)
        return bool(in_library or name in names or name.rpartition(".")[2] in attributes)

    found = {
        f"{file.relative_to(ROOT)} uses {name}; move it to an *_internals.py"
        for package in (*PACKAGES, "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        if file not in INTERNALS
        for name in full_names(ast.parse(file.read_text(encoding="utf-8")))
        if is_private(name)
    }
    assert not found


@pytest.mark.parametrize("file", INTERNALS, ids=lambda file: file.stem)
def test_modules_of_internals_give_a_reason_for_each_name(file: Path) -> None:
    reasons = set().union(*map(hidden_parts, declared(file)))
    used = full_names(ast.parse(file.read_text(encoding="utf-8")))
    assert set().union(*map(hidden_parts, used)) <= reasons


def test_everything_offered_exists_and_errors_share_a_root() -> None:
    assert sorted(pmet.__all__) == pmet.__all__
    for name in pmet.__all__:
        assert getattr(pmet, name).__doc__
    offered = [getattr(errors, name) for name in dir(errors) if name.endswith("Error")]
    assert all(issubclass(error, errors.PMETError) for error in offered)


def test_tests_stand_where_their_source_stands() -> None:
    """A renamed module takes its tests along."""
    exempt = {"test_demo_world"}
    for package in PACKAGES:
        tests = ROOT / "tests" / package
        for test in tests.rglob("test_*.py"):
            folder = ROOT / package / test.parent.relative_to(tests)
            name = test.stem.removeprefix("test_")
            assert test.stem in exempt or (folder / f"{name}.py").exists(), test


def test_the_example_job_is_a_job() -> None:
    assert load_job(ROOT / "examples" / "nightly.yaml").update.ranks == 4
