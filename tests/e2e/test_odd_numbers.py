"""Non-finite, subnormal and huge numbers in every place from which a job reads numbers.

Whatever the number, a job ends in one of four ways: it is refused, it rejects rows, it fails with
one sentence, or it publishes a model with only finite values. ``PMET_FUZZ`` sets the number of
jobs; each has an odd number in one place and runs in this process.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline import run
from pipeline.job.config import JobConfig, load_job
from pipeline.report.run_report import write_report
from pipeline.run import RunResult, run_job
from pipeline.storage.store import Store
from pmet.errors import InputError, PMETError
from tests.conftest import GOLDEN
from tests.e2e.conftest import facts

COUNT = int(os.environ.get("PMET_FUZZ", "28"))
FACTS, LAYERS, WIDTH, TOKENS = 3, 2, 16, 64
MODULE = "transformer.h.{}.mlp.c_proj"

NAN, INF = math.nan, math.inf
NOT_FINITE = (NAN, INF, -INF)
TINY = (5e-324, 1e-310, 1e-45, 1e-39, -0.0, 0.0)
HUGE = (1e300, -1e300, 1.7976931348623157e308, 3.4e38, -3.4e38, 1e30, 65504.0, 65520.0, 1e19)
ODD = (*NOT_FINITE, *TINY, *HUGE, -1.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Job:
    """A job's files in their own folder, for a place to change, and its job file's content."""

    folder: Path
    values: dict[str, Any]

    def path(self, name: str) -> Path:
        return self.folder / name

    def copy(self, name: str) -> Path:
        """Copy a file that all jobs share, and make the job use the copy."""
        source = Path(self.values[name])
        target = self.folder / source.name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        self.values[name] = str(target)
        return target

    def load(self, overrides: list[str]) -> JobConfig:
        self.path("job.yaml").write_text(yaml.safe_dump(self.values))
        return load_job(self.path("job.yaml"), overrides)


@dataclass(frozen=True)
class Site:
    """Files shared by all jobs: a random model, three facts, second moments, a finished run."""

    folder: Path

    def job(self, folder: Path, **changes: Any) -> Job:
        folder.mkdir()
        shared = {
            "model": "model",
            "requests": "requests.parquet",
            "hparams": "hparams.json",
            "second_moments": "moments.safetensors",
            "context_templates": "templates.json",
        }
        values: dict[str, Any] = {key: str(self.folder / name) for key, name in shared.items()}
        values["output"] = str(folder / "out")
        values["targets"] = {"workers": 0, "shard_size": 2}
        values["update"] = {"ranks": 0}
        return Job(folder, values | changes)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    found = Site(tmp_path_factory.mktemp("site"))
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "gpt2" / "model")
    tokenizer.save_pretrained(found.folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=2
    )
    GPT2LMHeadModel(config).save_pretrained(found.folder / "model")
    rows = [
        {key: fact[key] for key in ("prompt", "subject", "target_new", "target_true")}
        | {"case_id": float(fact["case_id"]), "weight": 0.5, "vector": [1.0, 2.0]}
        for fact in facts()[:FACTS]
    ]
    pq.write_table(pa.Table.from_pylist(rows), found.folder / "requests.parquet")
    hparams = {
        "layers": list(range(LAYERS)),
        "v_num_grad_steps": 3,
        "v_lr": 0.5,
        "clamp_norm_factor": 4.0,
        "mom2_update_weight": 10.0,
        "v_weight_decay": 0.5,
        "kl_factor": 1.0,
        "nll_loss_factor": 1.0,
    }
    (found.folder / "hparams.json").write_text(json.dumps(hparams))
    (found.folder / "templates.json").write_text(json.dumps([["{}"], ["So . {}"]]))
    moments = {}
    for layer in range(LAYERS):
        keys = torch.randn(512, 4 * WIDTH)
        moments[MODULE.format(layer)] = keys.T @ keys / len(keys)
    save_file(moments, found.folder / "moments.safetensors")
    stores = {
        "targets": {"workers": 0, "shard_size": 2, "store": str(found.folder / "targets")},
        "evaluate": {"store": str(found.folder / "measured")},
    }
    run_job(found.job(found.folder / "finished", **stores).load([]))
    return found


def odd(draw: random.Random) -> float:
    return draw.choice(draw.choice((NOT_FINITE, NOT_FINITE, TINY, HUGE, ODD)))


def spoil(draw: random.Random, tensor: torch.Tensor, value: Any) -> torch.Tensor:
    """A copy with an odd number in one place, a row, or everywhere."""
    spoilt = tensor.clone()
    flat, value = spoilt.view(-1), torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
    match draw.randrange(4):
        case 0 | 1:
            flat[draw.randrange(len(flat))] = value
        case 2:
            start = draw.randrange(len(flat))
            flat[start : start + 16] = value
        case 3:
            flat.fill_(value)
    return spoilt


def weights(draw: random.Random, job: Job) -> list[str]:
    path = job.copy("model") / "model.safetensors"
    dtype = draw.choice(DTYPES)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    name = draw.choice([*tensors, *(f"{MODULE.format(i)}.weight" for i in range(LAYERS))])
    if name not in tensors:
        name = draw.choice(list(tensors))
    tensors[name] = spoil(draw, tensors[name], odd(draw))
    save_file(tensors, path, metadata={"format": "pt"})
    return []


def half_precision(draw: random.Random, job: Job) -> list[str]:
    """A model stored in 16 bits, and an edit that may grow beyond them."""
    path = job.copy("model") / "model.safetensors"
    dtype = draw.choice((torch.float16, torch.bfloat16))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    hparams = json.loads(Path(job.values["hparams"]).read_text())
    hparams |= {"v_lr": 10 ** draw.uniform(0, 12), "clamp_norm_factor": 1e30}
    write(job, "hparams", hparams)
    return []


def moments(draw: random.Random, job: Job) -> list[str]:
    path = job.copy("second_moments")
    tensors = load_file(path)
    name = draw.choice(list(tensors))
    dtype = draw.choice((torch.float32, torch.float32, *DTYPES))
    tensors[name] = spoil(draw, tensors[name].to(dtype), odd(draw))
    save_file(tensors, path)
    return []


def published_moments(draw: random.Random, job: Job) -> list[str]:
    tensors = load_file(job.values["second_moments"])
    job.path("npz").mkdir()
    spoilt = draw.choice(list(tensors))
    for name, tensor in tensors.items():
        total, count = tensor.double() * 512, np.array(512)
        if name == spoilt:
            if draw.random() < 0.5:
                count = np.array(odd(draw))
            else:
                total = spoil(draw, total, odd(draw))
        kind = draw.choice((np.float32, np.float64))
        with np.errstate(all="ignore"):
            arrays = {"mom2.mom2": total.numpy().astype(kind), "mom2.count": count}
        np.savez(job.path("npz") / f"{name}_float32_mom2_512.npz", **arrays)
    job.values["second_moments"] = str(job.path("npz"))
    return []


def factors(draw: random.Random, job: Job) -> list[str]:
    """Second moments in a folder that keeps factors, one of them with an odd number."""
    folder = job.path("moments")
    folder.mkdir()
    shutil.copyfile(job.values["second_moments"], folder / "second_moments.safetensors")
    job.values["second_moments"] = str(folder)
    run_job(job.load(["output=" + str(job.path("first"))]))
    path = draw.choice(sorted((folder / "factors").iterdir()))
    value, tensors = odd(draw), load_file(path)
    jitter = 0.0
    if draw.random() < 0.3:
        jitter = value
    else:
        tensors["lower"] = spoil(draw, tensors["lower"], value)
    save_file(tensors, path, metadata={"jitter": repr(jitter)})
    return []


def write(job: Job, key: str, value: Any) -> None:
    """Write JSON with Python's notation for non-finite numbers, and make the job use it."""
    job.path(f"{key}.json").write_text(json.dumps(value))
    job.values[key] = str(job.path(f"{key}.json"))


def hyper_parameters(draw: random.Random, job: Job) -> list[str]:
    values = json.loads(Path(job.values["hparams"]).read_text())
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice(list(values))
        value: Any = draw.choice((odd(draw), 10 ** draw.uniform(-45, 45), 10**400))
        if key == "v_num_grad_steps" and 100 < value <= 1e9:
            value = 1e10  # an allowed value would be computed
        values[key] = [0, value] if key == "layers" else value
    write(job, "hparams", values)
    return []


def templates(draw: random.Random, job: Job) -> list[str]:
    groups: list[Any] = [["{}"], ["So . {}"]]
    group = draw.randrange(2)
    if draw.random() < 0.5:
        groups[group] = odd(draw)
    else:
        groups[group][0] = odd(draw)
    write(job, "context_templates", groups)
    return []


def settings(draw: random.Random, job: Job) -> list[str]:
    keys = ["seed", "targets.batch_size", "targets.shard_size", "targets.timeout"]
    keys += ["targets.threads_per_worker", "targets.gpus_per_worker", "update.shard_size"]
    keys += ["update.gpus_per_rank", "evaluate.sample", "evaluate.perplexity_texts"]
    keys += ["gates.efficacy", "gates.specificity_drop", "gates.fluency", "gates.score"]
    keys += ["gates.efficacy_drop_since_last", "gates.generalization_strict"]
    value = draw.choice((odd(draw), 10 ** draw.uniform(-300, 300), 10 ** draw.randrange(30)))
    return [f"{draw.choice(keys)}={yaml.safe_dump(value).splitlines()[0]}"]


def columns(draw: random.Random, job: Job) -> list[str]:
    table = pq.read_table(job.values["requests"])
    value, row = odd(draw), draw.randrange(FACTS)
    name = draw.choice(("case_id", "weight", "vector", "new", "target_new", "subject", "prompt"))
    values: list[Any] = [0.5] * FACTS
    values[row] = value
    if name in table.column_names and name not in ("case_id", "weight"):
        values = table.column(name).to_pylist()
    types: list[Any] = [pa.float64(), pa.float32(), pa.float16()]
    type_ = draw.choice(types)
    if name == "vector":
        values[row] = [value, 1.0]
        type_ = pa.list_(pa.float64())
    elif name in ("target_new", "subject", "prompt"):
        # A column of text that came out of a data frame as numbers.
        values, type_ = [value] * FACTS, pa.float64()
        values[(row + 1) % FACTS] = 1.0
    with np.errstate(all="ignore"):
        made = np.array(values, np.float16) if type_ == pa.float16() else values
        column = pa.array(made, type_)
    if name in table.column_names:
        table = table.set_column(table.column_names.index(name), name, column)
    else:
        table = table.append_column(name, column)
    pq.write_table(table, job.path("odd.parquet"))
    job.values["requests"] = str(job.path("odd.parquet"))
    if name in ("weight", "new", "case_id") and draw.random() < 0.5:
        return [f"evaluate.group_by={name}"]
    return []


def configuration(draw: random.Random, job: Job) -> list[str]:
    """The model's own configuration."""
    path = job.copy("model") / "config.json"
    values = json.loads(path.read_text())
    numbers = [k for k, v in values.items() if isinstance(v, int | float) and type(v) is not bool]
    values[draw.choice(numbers)] = odd(draw)
    path.write_text(json.dumps(values))
    return []


def stored_targets(draw: random.Random, job: Job) -> list[str]:
    """A store of targets written by an older run."""
    folder = job.path("targets")
    shutil.copytree(Path(job.values["model"]).parent / "targets", folder)
    path = draw.choice(sorted(folder.rglob("*.parquet")))
    table, value = pq.read_table(path), odd(draw)
    name = draw.choice(("target", "target", "loss"))
    column = table.column(name).combine_chunks()
    if name == "target":
        flat = column.flatten().to_numpy().copy()
        spoilt = spoil(draw, torch.from_numpy(flat), value).numpy()
        new: Any = pa.FixedSizeListArray.from_arrays(pa.array(spoilt), column.type.list_size)
    else:
        new = pa.array(spoil(draw, torch.tensor(column.to_pylist()), value).numpy())
    table = table.set_column(table.column_names.index(name), name, new)
    pq.write_table(table, path)
    return [f"targets.store={folder}"]


def stored_measurements(draw: random.Random, job: Job) -> list[str]:
    """A store of measurements written by an older run."""
    folder = job.path("measured")
    shutil.copytree(Path(job.values["model"]).parent / "measured", folder)
    path = draw.choice(sorted(folder.rglob("*.parquet")))
    table = pq.read_table(path)
    values = [spoilt_json(draw, json.loads(text)) for text in table.column("value").to_pylist()]
    column = pa.array([json.dumps(value) for value in values], pa.string())
    table = table.set_column(table.column_names.index("value"), "value", column)
    pq.write_table(table, path)
    return [f"evaluate.store={folder}"]


def last_run(draw: random.Random, job: Job) -> list[str]:
    """The figures of an earlier run, for gates to compare with."""
    finished = Path(job.values["model"]).parent / "finished" / "out"
    folder = job.path("last")
    shutil.copytree(finished, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["after"] = spoilt_json(draw, metrics["after"])
    (folder / "metrics.json").write_text(json.dumps(metrics))
    gate = draw.choice(("efficacy", "specificity", "score"))
    return [f"evaluate.last={folder}", f"gates.{gate}_drop_since_last=0.5"]


def records(draw: random.Random, job: Job) -> list[str]:
    """A run that resumes from records, one of which has an odd number."""
    finished = Path(job.values["model"]).parent / "finished"
    shutil.copytree(finished / "out", job.path("out"))
    folder = job.path("out") / "records"
    path = draw.choice([*folder.iterdir(), job.path("out") / "run.json"])
    path.write_text(json.dumps(spoilt_json(draw, json.loads(path.read_text()))))
    for name in draw.sample(("measured-after", "measured-before", "published", "layer-1"), 2):
        if (folder / f"{name}.json") != path:
            (folder / f"{name}.json").unlink(missing_ok=True)
    return []


def spoilt_json(draw: random.Random, value: Any) -> Any:
    """Return a copy with one number, if there is any, replaced by an odd one."""
    places = list(numbers_in(value))
    if not places:
        return value
    value = json.loads(json.dumps(value))
    *way, last = draw.choice(places)
    holder = value
    for key in way:
        holder = holder[key]
    holder[last] = odd(draw)
    return value


def numbers_in(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the paths to all numbers in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from ((key, *way) for way in numbers_in(item))
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield (key,)


PLACES: tuple[Callable[[random.Random, Job], list[str]], ...] = (
    weights,
    half_precision,
    moments,
    published_moments,
    factors,
    hyper_parameters,
    templates,
    settings,
    columns,
    configuration,
    stored_targets,
    stored_measurements,
    last_run,
    records,
)


def outcome(job: Job, overrides: list[str]) -> str:
    """Run a job; return which of the four allowed ways it ended in, and raise for any other."""
    try:
        ended = check_result(run_job(job.load(overrides)))
    except InputError:
        ended = "refused"
    except PMETError:
        ended = "failed with a sentence"
    check_published(job.path("out") / "model", ended)
    return ended


def check_result(result: RunResult) -> str:
    """Check the files of a job that succeeded or was held back; return how it ended."""
    for name in ("metrics.json", "run.json"):
        json.loads(result.folder.read_bytes(name), parse_constant=no_json)
    if result.status == "held":
        return "held back by a gate"
    return "set rows aside" if result.metrics["counts"]["rejected"] else "complete"


def no_json(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def no_report(_: Store) -> None:
    """Draw nothing."""


def check_published(model: Path, ended: str) -> None:
    """Assert that a published model is finite, as stored and as opened."""
    path = model / "model.safetensors"
    if not path.exists():
        assert ended in ("refused", "failed with a sentence")
        return
    for name, tensor in load_file(path).items():
        assert tensor.isfinite().all(), (ended, name)
        assert tensor.float().isfinite().all(), (ended, name, "read as float32")


def try_jobs(
    site: Site, folder: Path, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> Counter[tuple[str, str]]:
    """Run jobs, one per seed; return how they ended, by place."""
    ended: Counter[tuple[str, str]] = Counter()
    for seed in seeds:
        draw = random.Random(seed)
        # Drawing charts would take most of a small job's time.
        monkeypatch.setattr(run, "write_report", write_report if seed % 19 == 0 else no_report)
        place = PLACES[seed % len(PLACES)]
        job = site.job(folder / str(seed))
        overrides = place(draw, job)
        try:
            ended[place.__name__, outcome(job, overrides)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}, {place.__name__}, {overrides}")
            raise
        shutil.rmtree(job.folder)
    return ended


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(max(600, 5 * COUNT))
def test_no_odd_number_ends_in_a_model_that_is_not_finite(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = try_jobs(site, tmp_path, range(COUNT), monkeypatch)
    if 50 * len(PLACES) <= COUNT:
        assert {how for _, how in ended} >= {"complete", "refused", "failed with a sentence"}
