"""Conventions of the house, as tests; docs/layout.md describes the house itself."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pmet
from pipeline.job import load_job
from pmet import errors
from tests.conftest import ROOT

PACKAGES = ("pmet", "pipeline", "jobs")
ALLOWED = {"pmet": set(), "pipeline": {"pmet"}, "jobs": {"pipeline", "pmet"}}
UNKNOWN_TO_PMET = {"ray", "pyarrow", "deepspeed", "fsspec"}
MOST_MODULES = 15
LIBRARIES = {"ray", "deepspeed", "transformers", "torch"}
INTERNALS = {f: f.stem.removesuffix("_internals") for f in ROOT.glob("p*/*/*_internals.py")}

# Each line may import from the lines above it, never from below: modules and sub-packages that
# stand on one line know nothing of each other.
ORDER = {
    "pmet": [
        ["errors"],
        ["separator"],
        ["low_rank", "request", "safetensors_header", "strict_json", "yaml12"],
        ["presets", "endings"],
        ["hparams"],
        ["model"],
        ["reference"],
        ["targets", "update", "evaluation"],
        ["inspection"],
        ["delta"],
        ["edit"],
    ],
    "pipeline": [
        ["failures", "events"],
        ["errors"],
        ["progress"],
        ["storage"],
        ["job", "data"],
        ["cluster"],
        ["models"],
        ["evaluation"],
        ["harness"],
        ["run_folder"],
        ["second_moments", "report"],
        ["places", "hyper_parameters"],
        ["plan", "edits"],
        ["zero", "workers"],
        ["stages"],
        ["estimate", "export"],
        ["push"],
        ["run"],
    ],
    "jobs": [
        ["arguments", "streams", "views", "facts", "schedule", "submit"],
        ["demo", "refresh"],
        ["failure"],
        ["measure", "reports", "statistics"],
        ["inspect", "tune"],
        ["edits_cli", "facts_cli", "refresh_cli", "schedule_cli", "submit_cli", "tune_cli"],
        ["cli"],
        ["start"],
        ["__main__"],
    ],
}

# Modules without a test file of their own, and the file that tests what they do.
TESTED_IN = {
    "pmet.errors": "test_layout.py",
    "pmet.evaluation.questions": "pmet/evaluation/test_metrics.py",
    "pmet.inspection.passes": "pmet/inspection/test_tracing.py",
    "pmet.model.found_parts": "parity/test_other_families.py",
    "pmet.model.miniature": "pmet/model/test_discovery.py",
    "pmet.model.module_overrides": "pmet/targets/test_optimization.py",
    "pmet.model.prefix": "parity/test_families.py",  # cached prefixes against whole passes
    "pmet.model.tracing": "pmet/update/test_keys.py",
    "pmet.reference": "parity/test_golden.py",
    "pmet.targets.batch": "pmet/targets/test_optimization.py",
    "pmet.targets.mechanism": "parity/test_other_families.py",
    "pmet.targets.memory": "pmet/targets/test_optimization.py",
    "pmet.targets.problem": "pmet/targets/test_optimization.py",
    "pmet.targets.suffix": "pmet/targets/test_optimization.py",
    "pmet.targets.whole": "parity/test_other_families.py",
    "pmet.update.key_reader": "pmet/update/test_keys.py",
    "pmet.update.lookup_reader": "pmet/update/test_keys.py",
    "pmet.update.mechanism": "parity/test_other_families.py",
    "pmet.update.spill": "pmet/update/test_keys.py",
    "pmet.update.spread": "pmet/update/test_solver.py",
    "pmet.update.sums": "pmet/update/test_solver.py",
    "pmet.update.whole_reader": "parity/test_other_families.py",
    "pipeline.cluster.pool": "pipeline/cluster/test_worker_pool.py",  # both pools, one contract
    "pipeline.cluster.process": "pipeline/test_failures.py",
    "pipeline.cluster.shares": "pipeline/cluster/test_worker_pool.py",
    "pipeline.cluster.tasks": "pipeline/cluster/test_worker_pool.py",
    "pipeline.data.conversions": "pipeline/data/test_tables.py",
    "pipeline.data.rejections": "pipeline/data/test_tables.py",
    "pipeline.data.requests": "pipeline/data/test_tables.py",
    "pipeline.data.rows": "pipeline/data/test_shards.py",
    "pipeline.edits.arithmetic": "pipeline/edits/test_stacking.py",
    "pipeline.edits.carried": "pipeline/edits/test_rewriting.py",
    "pipeline.edits.output": "pipeline/edits/test_rewriting.py",
    "pipeline.estimate.calibration": "pipeline/estimate/test_prediction.py",
    "pipeline.export.adapter": "pipeline/export/test_exporting.py",
    "pipeline.export.card": "pipeline/export/test_exporting.py",
    "pipeline.export.factors": "pipeline/export/test_exporting.py",
    "pipeline.export.scores": "e2e/test_export.py",
    "pipeline.events": "pipeline/test_progress.py",
    "pipeline.harness.library": "pipeline/harness/test_tasks.py",
    "pipeline.job.yaml_files": "pipeline/job/test_config.py",
    "pipeline.models.opening": "pipeline/models/test_checkpoint.py",
    "pipeline.models.source": "pipeline/workers/test_worker.py",
    "pipeline.places": "e2e/test_own_files.py",  # what is read and written, in real jobs
    "pipeline.push.contents": "pipeline/push/test_pushing.py",
    "pipeline.report.html": "pipeline/report/test_run_report.py",
    "pipeline.run_folder.record": "pipeline/report/test_run_report.py",
    "pipeline.second_moments.factors": "pipeline/zero/test_rank.py",
    "pipeline.stages.context": "pipeline/stages/test_targets.py",
    "pipeline.stages.context_templates": "e2e/test_run.py",
    "pipeline.stages.harness": "e2e/test_harness.py",
    "pipeline.stages.publication": "e2e/test_run.py",
    "pipeline.stages.update": "e2e/test_serial.py",
    "pipeline.storage.digest": "pipeline/test_plan.py",
    "pipeline.storage.numbered_files": "pipeline/run_folder/test_lease.py",
    "pipeline.storage.parquet": "pipeline/data/test_tables.py",
    "pipeline.storage.segments": "pipeline/stages/test_measurement_store.py",
    "pipeline.storage.single_output": "e2e/test_own_files.py",
    "pipeline.workers.executor": "pipeline/workers/test_serial_executor.py",
    "pipeline.zero.experts": "e2e/test_experts.py",
    "jobs.__main__": "jobs/test_streams.py",
    "jobs.demo.interchange": "jobs/test_demo_world.py",
    "jobs.demo.show": "test_docs.py",
    "jobs.demo.train": "jobs/test_demo_world.py",
    "jobs.demo.world": "jobs/test_demo_world.py",
    "jobs.facts.dump.problems": "jobs/facts/dump/test_rows.py",
    "jobs.facts.dump.runs": "jobs/facts/test_neighbors.py",
    "jobs.facts.dump.settle": "jobs/facts/test_diff.py",
    "jobs.facts.dump.survey": "jobs/facts/test_diff.py",
    "jobs.facts.formats.beside": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.counterfact": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.easyedit": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.mquake": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.record": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.requests": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.ultraeditbench": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.wikibigedit": "jobs/facts/test_dataset.py",
    "jobs.facts.formats.zsre": "jobs/facts/test_dataset.py",
    "jobs.facts.sources": "jobs/test_facts_cli.py",
    "jobs.facts.staged": "jobs/facts/wikidata/test_stage.py",
    "jobs.facts.output": "jobs/facts/test_convert.py",
    "jobs.facts.tables.arrow": "jobs/facts/tables/test_stage.py",
    "jobs.facts.tables.lakes": "jobs/facts/tables/test_stage.py",
    "jobs.facts.tables.text": "jobs/facts/tables/test_stage.py",
    "jobs.facts.views": "jobs/test_facts_cli.py",
    "jobs.facts.wikidata.entities": "jobs/facts/wikidata/test_stage.py",
    "jobs.facts.wikidata.pages": "jobs/facts/wikidata/test_stage.py",
    "jobs.facts.wikidata.reader": "jobs/facts/wikidata/test_stage.py",
    "jobs.facts.wikidata.staging": "jobs/facts/wikidata/test_stage.py",
    "jobs.facts.wording": "jobs/facts/test_convert.py",
    "jobs.inspect.summary": "jobs/inspect/test_inspection.py",
    "jobs.inspect.views": "jobs/inspect/test_inspection.py",
    "jobs.measure": "jobs/test_cli.py",
    "jobs.refresh.views": "jobs/test_refresh_cli.py",
    "jobs.schedule.records": "jobs/test_schedule_cli.py",
    "jobs.schedule.views": "jobs/test_schedule_cli.py",
    "jobs.start": "jobs/test_streams.py",
    "jobs.submit.views": "jobs/test_submit_cli.py",
    "jobs.tune.views": "jobs/tune/test_tuning.py",
}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules that a file imports, anywhere in it, and the names that it takes from them."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield node.module or "", [alias.name for alias in node.names]


def unit_of(module: str) -> str:
    """The part of a package that a module is in: a sub-package or a module beside it."""
    return module.split(".")[1]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_within(package: str) -> Iterator[tuple[str, str, str]]:
    """The importing module, and the unit and the module that it imports, of one package."""
    for file in files_of(package):
        for module, names in imported(file):
            if module == package:
                yield from ((module_of(file), name, f"{package}.{name}") for name in names)
            elif module.startswith(f"{package}."):
                yield module_of(file), unit_of(module), module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(PACKAGES) - ALLOWED[package] - {package}
    if package == "pmet":
        forbidden |= UNKNOWN_TO_PMET
    files = files_of(package)
    assert files
    found = {
        (str(file), module)
        for file in files
        for module, _ in imported(file)
        if module.partition(".")[0] in forbidden
    }
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_within_a_package_runs_back_up(package: str) -> None:
    height = {unit: level for level, units in enumerate(ORDER[package]) for unit in units}
    there = {unit_of(f"{module_of(file)}.") for file in files_of(package)} - {""}
    assert there == set(height)
    up = {
        (importer, module)
        for importer, unit, module in imports_within(package)
        if importer != package
        and unit != unit_of(importer)
        and height[unit] >= height[unit_of(importer)]
    }
    assert not up


def folders() -> list[Path]:
    return sorted({file.parent for package in PACKAGES for file in files_of(package)})


def test_no_folder_has_more_modules_than_fit_on_a_shelf() -> None:
    counts = Counter(
        file.parent for package in PACKAGES for file in files_of(package) if file.stem[0] != "_"
    )
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def faces() -> dict[str, dict[str, str]]:
    """The names that sub-packages offer: by sub-package, the module of each name."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(ROOT.glob("p*/*/__init__.pyi")):
        package = module_of(file.with_suffix(".py"))
        found[package] = {
            alias.name: node.module or ""
            for node in parsed(file).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
    return found


def callers() -> Iterator[tuple[str, str, list[str]]]:
    """The caller, and the module and the names that it imports, of all source outside tests."""
    for folder in (*PACKAGES, "benchmarks", "examples"):
        for file in files_of(folder):
            for module, names in imported(file):
                yield module_of(file), module, names


def test_a_sub_package_is_reached_through_the_names_that_it_offers() -> None:
    offered = faces()
    assert len(offered) == 22
    inside = {
        (caller, module)
        for caller, module, _ in callers()
        for package in offered
        if module.startswith(f"{package}.") and not caller.startswith(f"{package}.")
    }
    assert not inside
    unknown = {
        (caller, module, name)
        for caller, module, names in callers()
        for name in names
        if module in offered and not caller.startswith(f"{module}.") and name not in offered[module]
    }
    assert not unknown


def test_a_sub_package_offers_only_what_others_use() -> None:
    used = defaultdict(set)
    for caller, module, names in callers():
        if not caller.startswith(f"{module}."):
            used[module] |= set(names)
    idle = {
        (package, name)
        for package, names in faces().items()
        for name in names
        if name not in used[package]
    }
    assert not idle


def test_pipeline_has_no_public_name_that_only_tests_use() -> None:
    source = [
        file.read_text(encoding="utf-8")
        for folder in (*PACKAGES, "benchmarks", "examples")
        for file in files_of(folder)
    ]
    words = Counter(word for text in source for word in re.findall(r"\w+", text))
    idle = {
        (module_of(file), node.name)
        for file in files_of("pipeline")
        for node in parsed(file).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        if not node.name.startswith("_") and words[node.name] < 2
    }
    assert not idle


def declared(file: Path) -> set[str]:
    """The private names that a module of internals says it uses: the keys of its ``NAMES``."""
    for node in parsed(file).body:
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
        for name in full_names(parsed(file))
        if is_private(name)
    }
    assert not found


@pytest.mark.parametrize("file", INTERNALS, ids=lambda file: file.stem)
def test_modules_of_internals_give_a_reason_for_each_name(file: Path) -> None:
    reasons = set().union(*map(hidden_parts, declared(file)))
    used = full_names(parsed(file))
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


def test_every_module_has_tests() -> None:
    """Beside the source, or where ``TESTED_IN`` says: in a file that imports or names it."""
    modules = [
        module_of(file)
        for package in PACKAGES
        for file in files_of(package)
        if file.name != "__init__.py"
    ]
    assert set(TESTED_IN) <= set(modules)
    for module in modules:
        *folders, name = module.split(".")
        own = ROOT.joinpath("tests", *folders, f"test_{name}.py")
        if module not in TESTED_IN:
            assert own.exists(), f"{module} has no tests: write {own} or say where they are"
        else:
            assert not own.exists(), f"{module} has tests of its own by now"
            assert (ROOT / "tests" / TESTED_IN[module]).exists(), module


def test_the_example_job_is_a_job() -> None:
    assert load_job(ROOT / "examples" / "nightly.yaml").update.ranks == 4
