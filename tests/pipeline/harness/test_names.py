"""The search for names in task files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.harness.names import TaskNames, is_path

FILES = {
    "birds/owls.yaml": "tag: [nature, night]\ntask: owls\n",
    "birds/all.yaml": "group: birds\ntask:\n  - owls\n  - task: herons\n    num_fewshot: 2\n",
    "birds/wet/herons.yaml": '"task": "herons"\ninclude: ../owls.yaml\n',
    "lists/best.yaml": "group: best\ntask: [gannets,\n  'birds']\n",
    "broken/x.yaml": "task: [\n\xff",
}


@pytest.fixture
def names(tmp_path: Path) -> TaskNames:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return TaskNames.read(tmp_path)


def test_a_name_leads_to_the_folders_that_mention_it(names: TaskNames, tmp_path: Path) -> None:
    assert names.folders(["owls"]) == {tmp_path / "birds"}
    assert names.folders(["herons"]) == {tmp_path / "birds"}
    assert names.folders(["birds"]) == {tmp_path / "birds", tmp_path / "lists"}
    assert names.folders(["nature"]) == {tmp_path / "birds"}
    assert names.folders(["gulls"]) == set()


def test_a_misspelt_name_has_near_ones(names: TaskNames) -> None:
    assert names.defined == {"owls", "herons", "birds", "best"}
    assert names.near("heron") == ["herons"]
    assert names.near("quite something else") == []


def test_a_slash_or_the_ending_of_a_yaml_file_makes_a_path() -> None:
    assert all(map(is_path, ["a/b", "./tasks", "x.yaml", "x.yml", ".", "/tasks"]))
    assert not any(map(is_path, ["hellaswag", "mmlu_pro", "arc.easy"]))
