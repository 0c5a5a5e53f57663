"""Tasks: found, read, refused, measured as the library itself measures them."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import JobError, WorkerError
from pipeline.harness.answering import Answer, Part, answer
from pipeline.harness.tasks import HarnessTasks
from pipeline.job import HarnessConfig
from tests.conftest import load_golden

pytestmark = pytest.mark.usefixtures("datasets_cache")

DATA = Path(__file__).parent / "data"
LONGEST = 128


def read(*names: str | Path, chat: bool = False, tokenizer: Any = None, **given: Any) -> Any:
    config = HarnessConfig(tasks=tuple(map(str, names)), **given)
    own = tokenizer or load_golden("gpt2").tokenizer
    return HarnessTasks.read(config, own, chat=chat, longest=LONGEST)


def ask(parts: list[Part]) -> list[list[Answer]]:
    golden = load_golden("gpt2")
    return [answer(golden.model, golden.tokenizer, part) for part in parts]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the tasks, to change."""
    return Path(shutil.copytree(DATA, tmp_path / "tasks"))


def edit(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


def test_nothing_is_read_without_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert read() is None


def test_the_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.harness.tasks.find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"lm_eval.*pip install 'pmet-pipeline\[harness\]'"):
        read(DATA)


def test_scores_are_those_of_the_library_itself() -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    golden = load_golden("gpt2")
    tasks = read(DATA, num_fewshot=2)
    assert tasks.names == {str(DATA): ["cities", "trades"]}
    assert tasks.requests == {"cities": 12, "trades": 48}
    found = {name: tasks.scores(name, ask) for name in tasks.keys}
    model = HFLM(golden.model, tokenizer=copy.deepcopy(golden.tokenizer), batch_size=8)
    theirs = {name: tasks._tasks[name] for name in tasks.keys}
    for task in theirs.values():
        task.set_fewshot_seed(seed=1234)
    results = evaluate(lm=model, task_dict={"tasks": theirs}, bootstrap_iters=0)["results"]
    assert found["trades"].metrics == {
        name: results["trades"][f"{name},none"] for name in ("acc", "acc_norm")
    }
    assert found["cities"].value == results["cities"]["exact_match,stripped"]
    assert found["cities"].metric == "exact_match (stripped)"
    assert 0 < found["cities"].value < 1
    assert found["trades"].num_fewshot == 2
    # The same examples and answers every time.
    assert tasks.scores("trades", ask) == found["trades"]


def test_a_metric_of_the_job_is_the_main_one_where_a_task_has_it() -> None:
    tasks = read(DATA, metric="acc_norm", limit=4)
    assert [tasks.scores(name, ask).metric for name in ("trades", "cities")] == [
        "acc_norm",
        "exact_match (stripped)",
    ]
    assert tasks.requests == {"cities": 4, "trades": 16}


def test_a_key_follows_what_is_asked_not_where_the_files_are(own: Path) -> None:
    first = read(DATA).keys
    assert read(own).keys == first
    changed = [read(own, num_fewshot=1).keys, read(own, limit=5).keys, read(own, metric="f1").keys]
    # What judges the answers counts too, though the model does not see it.
    edit(own / "trades.jsonl", '"answer": ', '"answer": 3, "was": ')
    changed.append(read(own).keys)
    edit(own / "trades.yaml", "{{subject}} works as", "{{subject}} earns a living as")
    changed.append(read(own).keys)
    edit(own / "trades.yaml", "  - metric: acc\n", "  - metric: acc_bytes\n")
    changed.append(read(own).keys)
    assert len({first["trades"], *(keys["trades"] for keys in changed)}) == 7
    assert {keys["cities"] for keys in changed[3:]} == {first["cities"]}


def test_questions_are_asked_in_the_chat_template() -> None:
    tokenizer = copy.deepcopy(load_golden("gpt2").tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    seen: list[Part] = []

    def asked(parts: list[Part]) -> list[list[Answer]]:
        seen.extend(parts)
        return [[(-1.0, False)] * len(part.arguments) for part in parts]

    tasks = read(DATA / "trades.yaml", chat=True, tokenizer=tokenizer, limit=1, num_fewshot=1)
    tasks.scores("trades", asked)
    context = seen[0].arguments[0][0]
    assert context.startswith("<user>")
    assert context.count("<assistant>") == 2
    assert context.endswith("works as<assistant>")
    assert tasks.keys != read(DATA / "trades.yaml", limit=1, num_fewshot=1).keys


@pytest.fixture
def bundled(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree like the library's, which has only these tasks, and two groups of them."""
    from pipeline.harness import library

    tree = own.parent / "bundled"
    (tree / "lists").mkdir(parents=True)
    shutil.move(own, tree / "world")
    monkeypatch.setattr(library, "BUNDLED", tree)
    for name in ("cities", "trades"):
        text = (tree / "world" / f"{name}.yaml").read_text()
        data = tree / "world" / f"{name}.jsonl"
        (tree / "world" / f"{name}.yaml").write_text(text.replace(f"{name}.jsonl", str(data)))
    trades = (tree / "world" / "trades.yaml").read_text()
    more = trades.replace("task: trades", "task: more_trades")
    (tree / "world" / "more.yaml").write_text(more)
    for name, of in (("all_trades", "trades, more_trades"), ("best", "all_trades")):
        (tree / "lists" / f"{name}.yaml").write_text(f"group: {name}\ntask: [{of}]\n")
    return tree


def test_a_name_leads_to_a_bundled_task_and_a_group_to_all_of_its_own(bundled: Path) -> None:
    # Its members are in a folder that does not mention it.
    assert read("best", limit=1).names == {"best": ["trades", "more_trades"]}
    tasks = read("cities", "best", limit=3)
    assert tasks.names == {"cities": ["cities"], "best": ["trades", "more_trades"]}
    rows = tasks.named({name: tasks.scores(name, ask) for name in tasks.keys})
    assert [(row.name, row.documents) for row in rows] == [("cities", 3), ("best", 6)]


def test_all_unknown_names_are_refused_at_once_with_near_ones(bundled: Path) -> None:
    with pytest.raises(JobError) as error:
        read("citties", "trades", "./nowhere.yaml")
    first, second = str(error.value).splitlines()
    assert "has no task citties; did you mean cities?" in first
    assert second == (
        "evaluate.harness: there is no file or folder ./nowhere.yaml; give a path on this machine"
    )


def test_a_data_set_that_cannot_be_downloaded_is_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def fail(*args: Any, **named: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(JobError, match=r"trades.yaml cannot be read \(ConnectionError: Couldn't "):
        read(own / "trades.yaml")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(JobError, match="HF_DATASETS_OFFLINE is set: load it once without") as error:
        read(own / "trades.yaml")
    assert "\n" not in str(error.value)


Change = Callable[[Path], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "code that the model writes": (
        lambda own: edit(own / "trades.yaml", "task: trades", "task: trades\nunsafe_code: true"),
        "executes code that the model writes",
    ),
    "images": (
        lambda own: edit(own / "trades.yaml", "task: trades", "task: trades\ndoc_to_image: x"),
        "needs images or sound",
    ),
    "more text than the model reads": (
        lambda own: edit(own / "cities.yaml", "max_gen_toks: 16", "max_gen_toks: 128"),
        "cities generates up to 128 tokens, but the model reads only 128",
    ),
    "a template without its field": (
        lambda own: edit(own / "cities.yaml", "{{city}}", "{{town}}"),
        r"cities.yaml cannot be read \(UndefinedError: 'town' is undefined",
    ),
    "one task twice": (
        lambda own: shutil.copy(own / "trades.yaml", own / "again.yaml"),
        "the task trades is there twice",
    ),
    "a folder without tasks": (
        lambda own: [file.unlink() for file in own.glob("*.yaml")],
        "holds no task",
    ),
    "not YAML": (lambda own: (own / "trades.yaml").write_text("a: ["), "ParserError"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_task_that_cannot_be_measured_is_refused(kind: str, own: Path) -> None:
    change, reason = REFUSED[kind]
    change(own)
    with pytest.raises(JobError, match=reason):
        read(own)


def test_a_file_that_is_no_task_is_refused_and_in_a_folder_left_out(own: Path) -> None:
    (own / "_base.yaml").write_text("test_split: test\n")
    edit(own / "trades.yaml", "test_split: test\n", "include: _base.yaml\n")
    with pytest.raises(JobError, match=r"_base.yaml is not a task: it has no key task"):
        read(own / "_base.yaml")
    assert set(read(own, limit=1).keys) == {"cities", "trades"}


def test_python_beside_a_file_of_the_job_is_the_users_own(own: Path) -> None:
    (own / "ask.py").write_text("def question(doc):\n    return doc['subject'] + ' is'\n")
    edit(own / "trades.yaml", '"{{subject}} works as"', "!function ask.question")
    seen: list[str] = []

    def asked(parts: list[Part]) -> list[list[Answer]]:
        seen.extend(context for part in parts for context, _ in part.arguments)
        return [[(-1.0, False)] * len(part.arguments) for part in parts]

    read(own / "trades.yaml", limit=1).scores("trades", asked)
    assert seen[0].endswith(" is")


def test_answers_that_cannot_be_judged_are_the_tasks_fault_and_a_lost_worker_is_not(
    own: Path,
) -> None:
    (own / "judge.py").write_text("def judge(doc, results):\n    return {'acc': 1 / 0}\n")
    edit(
        own / "trades.yaml", "task: trades", "task: trades\nprocess_results: !function judge.judge"
    )
    tasks = read(own / "trades.yaml", limit=1)
    with pytest.raises(JobError, match=r"answers to trades cannot be judged \(ZeroDivisionError: "):
        tasks.scores("trades", ask)

    def lost(parts: list[Part]) -> list[list[Answer]]:
        raise WorkerError("the worker exited")

    with pytest.raises(WorkerError, match="the worker exited"):
        tasks.scores("trades", lost)
