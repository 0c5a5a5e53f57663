"""Second moments over a corpus equal a plain computation, for any workers and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cluster.pool import Pool, SerialPool, run_all
from pipeline.cluster.tasks import Task
from pipeline.cluster.worker_pool import WorkerPool
from pipeline.errors import JobError
from pipeline.events import EventKind
from pipeline.models.source import ModelSource
from pipeline.progress import Stage
from pipeline.second_moments import collection
from pipeline.second_moments.collection import PARTS, MomentsJob, collect, finished, plan_statistics
from pipeline.second_moments.files import PROVENANCE, TENSORS, check_moments, read_moments
from pipeline.storage.store import Store
from pipeline.workers.worker import ModelWorker
from pmet.hparams import PMETHyperParams
from pmet.model.architecture import resolve
from pmet.model.tracing import captured_input
from tests.conftest import GOLDEN, ROOT, Golden, load_golden

TEXTS = json.loads((GOLDEN / "corpus.json").read_text())
BUDGET, FEW_TOKENS, MAX_LENGTH = 3000, 1000, 20

# Code of the other process of `test_a_killed_pass…`: it dies by SIGKILL after its second part.
PASS = """
import os, signal, sys
from pipeline.second_moments import collection
from pipeline.cluster.pool import run_all
from pipeline.cluster.pool import SerialPool
from pipeline.progress import Stage
from pipeline.workers.worker import ModelWorker
from pipeline.storage.store import Store
from pmet.hparams import PMETHyperParams

model, corpus, hparams, output, budget, cut = sys.argv[1:]
collection._PART_TOKENS = 300
job = collection.plan_statistics(
    model, [corpus], PMETHyperParams.from_file(hparams),
    tokens=int(budget), max_length=int(cut), on_gpu=False,
)

class Fatal(Stage):
    def note(self, text):
        if text.startswith("2 of"):
            os.kill(os.getpid(), signal.SIGKILL)

def run_tasks(method, tasks, take):
    with SerialPool(ModelWorker, init_args=(job.source,), threads=1) as pool:
        run_all(pool, method, tasks, take)

collection.collect(job, Store(output), run_tasks, Fatal())
"""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "_PART_TOKENS", 300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    pq.write_table(pa.table({"text": TEXTS}), file)
    return file


def plan(file: Path, family: str = "gpt2", **changes: Any) -> MomentsJob:
    given: dict[str, Any] = {
        "model": str(GOLDEN / family / "model"),
        "corpus": [str(file)],
        "hparams": load_golden(family).hparams,
        "tokens": BUDGET,
        "max_length": MAX_LENGTH,
        "on_gpu": False,
    }
    return plan_statistics(**(given | changes))


def compute(job: MomentsJob, output: Path, pool: Pool | None = None) -> tuple[list[str], Any]:
    """Collect into a folder; return the tasks that ran and the result of `collect`."""
    ran: list[str] = []

    def run_tasks(method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        ran.extend(task.key for task in tasks)
        with pool or SerialPool(ModelWorker, init_args=(job.source,), threads=1) as workers:
            run_all(workers, method, tasks, take)

    return ran, collect(job, Store(output), run_tasks, Stage())


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def plainly(golden: Golden) -> tuple[dict[int, torch.Tensor], int]:
    """Compute one text and one layer at a time, with every key in float64."""
    layout = resolve(golden.model, golden.hparams)
    sums: dict[int, Any] = dict.fromkeys(golden.hparams.layers, 0)
    tokens = 0
    for text in TEXTS:
        ids = golden.tokenizer(text)["input_ids"][: min(MAX_LENGTH, FEW_TOKENS - tokens)]
        if not ids:
            break
        tokens += len(ids)
        for layer in sums:
            with captured_input(layout.down_projection(golden.model, layer)) as seen:
                golden.model(input_ids=torch.tensor([ids]))
            keys = seen.tensor[0].double()
            sums[layer] = sums[layer] + keys.T @ keys
    return {layer: total / tokens for layer, total in sums.items()}, tokens


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection, "_PART_TOKENS", 300)
        output = tmp_path_factory.mktemp("reference")
        ran, _ = compute(plan(corpus), output)
    assert len(ran) == 10
    return files(output)


@torch.no_grad()
def test_it_is_the_plain_computation(golden: Golden, corpus: Path, tmp_path: Path) -> None:
    job = plan(corpus, golden.family, tokens=FEW_TOKENS)
    _, said = compute(job, tmp_path)
    expected, tokens = plainly(golden)
    assert said["tokens"] == tokens == FEW_TOKENS
    layers = golden.hparams.layers
    assert check_moments(str(tmp_path), job.layout, layers, job.model)
    for layer, mean_KK in read_moments(str(tmp_path), job.layout, layers).items():
        # Float32: rounding of the stored means and of padded forward passes.
        apart = torch.linalg.norm(mean_KK.double() - expected[layer])
        assert apart <= 1e-6 * torch.linalg.norm(expected[layer])


def test_counterfact_has_the_second_moments_beside_it(
    counterfact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    hparams = PMETHyperParams.from_file(counterfact_folder / "hparams.json")
    job = plan_statistics(
        str(counterfact_folder / "model"),
        [str(counterfact_folder / "corpus.parquet")],
        hparams,
        tokens=1_000_000,
        max_length=1024,
        on_gpu=False,
    )
    compute(job, tmp_path)
    theirs = str(counterfact_folder / TENSORS)
    expected = read_moments(theirs, job.layout, hparams.layers)
    for layer, mean_KK in read_moments(str(tmp_path), job.layout, hparams.layers).items():
        apart = torch.linalg.norm(mean_KK.double() - expected[layer].double())
        assert apart <= 1e-6 * torch.linalg.norm(expected[layer].double())


def test_the_provenance_says_what_was_counted(corpus: Path, reference: dict[str, bytes]) -> None:
    assert reference.keys() == {TENSORS, PROVENANCE}
    job, said = plan(corpus), json.loads(reference[PROVENANCE])
    assert said["key"] == job.key
    assert said.items() >= job.identity.items()
    assert (said["tokens"], said["budget"], said["parts"]) == (BUDGET, BUDGET, 10)
    assert said["files"] == [str(corpus)]
    assert said["max_length"] == MAX_LENGTH
    assert said["dtype"] == "float32"
    assert said["versions"]["torch"] == torch.__version__
    assert said["convergence"].keys() == set(job.modules)
    assert all(0 < moved < 0.3 for moved in said["convergence"].values())


def test_convergence_falls_with_the_square_root_of_the_tokens(corpus: Path, tmp_path: Path) -> None:
    _, few = compute(plan(corpus, tokens=2500), tmp_path / "few")
    _, many = compute(plan(corpus, tokens=10_000), tmp_path / "many")
    for module, moved in few["convergence"].items():
        # It would be half as large if the texts were independent of each other.
        assert 0.3 <= many["convergence"][module] / moved <= 0.75


class Mortal(ModelWorker):
    """Kills its process at the third part, once; the mark records that."""

    mark: Path

    def __init__(self, source: ModelSource, mark: Path) -> None:
        super().__init__(source)
        self.mark = mark

    def sum_second_moments(self, *args: Any) -> Any:
        value = super().sum_second_moments(*args)
        if args[-1].endswith("00002") and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return value


def test_any_number_of_workers_and_a_death_give_the_same_bytes(
    corpus: Path, reference: dict[str, bytes], local_ray: None, tmp_path: Path
) -> None:
    job, deaths = plan(corpus), []

    def on_event(kind: EventKind, _text: str, **_: Any) -> None:
        deaths.append(kind)

    mark = tmp_path / "mark"
    pool = WorkerPool(Mortal, count=2, init_args=(job.source, mark), threads=1, on_event=on_event)
    compute(job, tmp_path / "out", pool)
    assert mark.exists()
    assert EventKind.DEATH in deaths
    assert files(tmp_path / "out") == reference


def test_a_killed_pass_goes_on_and_ends_with_the_same_bytes(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    gpt2, output = GOLDEN / "gpt2", tmp_path / "out"
    given = [gpt2 / "model", corpus, gpt2 / "hparams.json", output, BUDGET, MAX_LENGTH]
    killed = subprocess.run(
        [sys.executable, "-c", PASS, *map(str, given)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    job = plan(corpus)
    assert not check_moments(str(output), job.layout, job.hparams.layers, job.model)
    # A record with a truncated file does not count as finished.
    records = sorted((output / PARTS).rglob("*.json"))
    assert [record.stem for record in records] == ["00000", "00001"]
    file = output / json.loads(records[1].read_text())["files"][0]["file"]
    file.write_bytes(file.read_bytes()[:-1])
    ran, said = compute(job, output)
    assert len(ran) == 9
    assert said["reused"] == 1
    assert files(output) == reference


def test_parts_of_other_inputs_are_never_used(corpus: Path, tmp_path: Path) -> None:
    job = plan(corpus)

    def interrupted(method: str, tasks: Sequence[Task], take: Callable[..., None]) -> None:
        with SerialPool(ModelWorker, init_args=(job.source,), threads=1) as pool:
            run_all(pool, method, tasks[:3], take)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(job, Store(tmp_path), interrupted, Stage())
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"text": [*TEXTS[:5], "Another text.", *TEXTS[6:]]}), other)
    changes: list[dict[str, Any]] = [
        {"tokens": BUDGET - 1},  # of the same texts
        {"max_length": MAX_LENGTH - 1},
        {"corpus": [str(other)]},
        {"family": "gptj"},
        {"hparams": load_golden("gpt2").hparams.model_copy(update={"layers": (0, 1)})},
    ]
    jobs = [plan(corpus, **change) for change in changes]
    assert len({job.key, *(j.key for j in jobs)}) == 6
    assert jobs[0].corpus.digest == job.corpus.digest
    ran, said = compute(jobs[0], tmp_path)
    assert (len(ran), said["reused"]) == (len(jobs[0].parts()), 0)
    assert not (tmp_path / PARTS).exists()
    # Finished ones are reused, and others are not overwritten.
    assert finished(jobs[0], Store(tmp_path)) is not None
    names = ["budget", "max_length", "corpus", "model", "layers"]
    for name, job in zip(names[1:], jobs[1:], strict=True):
        with pytest.raises(JobError, match=rf"holds other second moments \(.*{name}.* changed\)"):
            finished(job, Store(tmp_path))


def test_a_crash_before_the_provenance_is_repaired(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / TENSORS).write_bytes(reference[TENSORS])
    assert finished(plan(corpus), Store(tmp_path)) is None
    compute(plan(corpus), tmp_path)
    assert files(tmp_path) == reference
    (tmp_path / PROVENANCE).unlink()
    (tmp_path / TENSORS).write_bytes((GOLDEN / "gpt2" / TENSORS).read_bytes())
    with pytest.raises(JobError, match="does not say how it was made; name another folder"):
        finished(plan(corpus), Store(tmp_path))


def test_wide_keys_are_kept_in_fewer_parts(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan(corpus)
    one = len(job.hparams.layers) * 8 * job.layout.key_width**2
    monkeypatch.setattr(collection, "_ALL_PARTS_BYTES", 5 * one)
    assert len(job.parts()) == 4
    monkeypatch.setattr(collection, "_ALL_PARTS_BYTES", one // 2)
    assert len(job.parts()) == 2
    assert sum(len(s) for part in job.parts() for s in part) == BUDGET
