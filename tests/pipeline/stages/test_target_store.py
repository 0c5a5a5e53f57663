"""Targets stored for later runs: found again, bit-equal, by any run with the same request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tables import TargetArrays
from pipeline.errors import StorageError
from pipeline.job.config import JobConfig
from pipeline.plan import Plan, make_plan
from pipeline.stages.target_store import TargetStore
from pipeline.storage.store import Store
from pmet.request import EditRequest
from tests.conftest import GOLDEN

WIDTH = 24


def requests(count: int, start: int = 0) -> list[EditRequest]:
    return [EditRequest("{} is", f"subject {n}", "new") for n in range(start, start + count)]


def targets(count: int, seed: int = 0) -> TargetArrays:
    """Return tiny, huge and negative numbers."""
    random = np.random.default_rng(seed)
    exponents = random.uniform(-44, 37, (count, WIDTH))
    values = (10.0**exponents * random.choice([-1, 1], (count, WIDTH))).astype(np.float32)
    steps = random.integers(1, 31, count).astype(np.int32)
    losses, first_losses = random.random((2, count)).astype(np.float32)
    return TargetArrays(np.arange(count), values, steps, losses, first_losses)


def opened(url: str, **changes: Any) -> TargetStore:
    return TargetStore(Store(url), {"model": "m", **changes}, WIDTH)


def found(store: TargetStore, wanted: list[EditRequest]) -> TargetArrays:
    """Return the targets that a lookup finds; rows are indices into ``wanted``."""
    keys = [store.key(request) for request in wanted]
    with store.lookup(keys) as stored:
        there = [place for place, key in enumerate(keys) if key in stored]
        assert len(stored) == len(there)
        return stored.arrays([keys[place] for place in there], there)


def same(one: TargetArrays, two: TargetArrays) -> bool:
    return (
        np.array_equal(one.values.view(np.int32), two.values.view(np.int32))
        and np.array_equal(one.steps, two.steps)
        and np.array_equal(one.losses.view(np.int32), two.losses.view(np.int32))
        and np.array_equal(one.first_losses, two.first_losses, equal_nan=True)
    )


def rewritten(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite the store's only segment as another writer would have left it."""
    (segment,) = folder.rglob("*.parquet")
    table = change(pq.read_table(segment))
    segment.unlink()
    other = segment.parent / "new.parquet"
    pq.write_table(table, other)
    other.rename(segment.parent / f"{hashlib.sha256(other.read_bytes()).hexdigest()}.parquet")


def test_segments_of_older_releases_lack_the_first_loss_only(tmp_path: Path) -> None:
    store, old, new = opened(str(tmp_path)), targets(3), targets(3, seed=1)
    store.write(requests(3), old)
    rewritten(tmp_path, lambda table: table.drop_columns(["first_loss"]))
    store.write(requests(3, start=3), new)
    again = found(store, requests(6))
    assert again.rows.tolist() == list(range(6))
    assert again.first_losses is not None
    assert np.isnan(again.first_losses[:3]).all()
    assert np.array_equal(again.first_losses[3:], new.first_losses)
    assert np.array_equal(again.values[:3].view(np.int32), old.values.view(np.int32))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_target_that_is_not_finite_is_not_taken_from_the_store(
    tmp_path: Path, odd: float
) -> None:
    store = opened(str(tmp_path))
    store.write(requests(3), targets(3))

    def damage(table: pa.Table) -> pa.Table:
        flat = table.column("target").combine_chunks().flatten().to_numpy().copy()
        flat[WIDTH] = odd
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat), WIDTH)
        return table.set_column(table.column_names.index("target"), "target", column)

    rewritten(tmp_path, damage)
    assert len(found(store, requests(3)).rows) == 2


def test_what_was_written_is_found_to_the_bit(any_url: str) -> None:
    store = opened(any_url)
    assert len(found(store, requests(3)).rows) == 0
    first, second = targets(5, seed=1), targets(7, seed=2)
    store.write(requests(5), first)
    store.write(requests(7, start=5), second)
    again = found(opened(any_url), requests(20))
    assert again.rows.tolist() == list(range(12))
    both = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    assert same(again, TargetArrays(*both))
    # From the middle of both files, in the requested order.
    some = found(opened(any_url), requests(20)[8:2:-1])
    assert np.array_equal(some.values, again.values[8:2:-1])
    assert len(found(opened(any_url, model="other"), requests(20)).rows) == 0


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    store, arrays = opened(str(tmp_path)), targets(4)
    arrays.values[1, 3], arrays.values[2, 0] = np.nan, np.inf
    store.write(requests(4), arrays)
    assert found(store, requests(4)).rows.tolist() == [0, 3]
    arrays.values[:] = np.nan
    store.write(requests(4, start=10), arrays)
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_several_writers_lose_nothing(any_url: str) -> None:
    def write(number: int) -> None:
        opened(any_url).write(requests(3, start=3 * number), targets(3, seed=number))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    write(0)
    assert found(opened(any_url), requests(24)).rows.tolist() == list(range(24))
    names = [n for n in Store(any_url).list() if n.endswith(".parquet")]
    assert len(names) == 8, "the same targets twice are one segment"
    for name in names:
        digest = hashlib.sha256(Store(any_url).read_bytes(name)).hexdigest()
        assert name == f"{opened(any_url).digest}/{digest}.parquet"
    said = Store(any_url).read_json(f"{opened(any_url).digest}/context.json")
    assert said == {"model": "m"}


def test_of_two_targets_everybody_finds_the_same(tmp_path: Path) -> None:
    store = opened(str(tmp_path))
    store.write(requests(6), targets(6, seed=1))
    store.write(requests(6, start=3), targets(6, seed=2))
    together = found(store, requests(9))
    assert together.rows.tolist() == list(range(9))
    _, second = sorted(tmp_path.rglob("*.parquet"))
    second.unlink()
    first = found(store, requests(9))
    assert len(first.rows) == 6
    assert np.array_equal(together.values[first.rows], first.values)


@pytest.mark.parametrize("what", ["values", "end"])
def test_a_damaged_segment_is_named(tmp_path: Path, what: str) -> None:
    store = opened(str(tmp_path))
    store.write(requests(50), targets(50))
    store.write(requests(50, start=50), targets(50, seed=1))
    victim = max(tmp_path.rglob("*.parquet"))
    data = bytearray(victim.read_bytes())
    if what == "values":
        data[len(data) // 2] ^= 1
    else:
        del data[-20:]
    victim.write_bytes(data)
    with pytest.raises(StorageError) as error:
        found(store, requests(100))
    assert str(error.value).startswith(f"targets.store: {victim} cannot be read (")
    assert str(error.value).endswith("); delete the file and run again")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    file = tmp_path_factory.mktemp("plan") / "requests.parquet"
    rows = [{"prompt": "{} works as", "subject": "Sur Bavov", "target_new": "a baker"}]
    pq.write_table(pa.Table.from_pylist(rows), file)
    job = JobConfig.model_validate(
        {
            "model": str(GOLDEN / "gpt2" / "model"),
            "requests": (str(file),),
            "output": "unused",
            "hparams": str(GOLDEN / "gpt2" / "hparams.json"),
            "second_moments": str(GOLDEN / "gpt2" / "second_moments.safetensors"),
            "targets": {"store": "memory://never-written"},
        }
    )
    return make_plan(job)


def key(plan: Plan, templates: list[list[str]] | None = None, **request: Any) -> str:
    store = TargetStore.of(plan, templates or [["{}"], ["So. {}"]])
    assert store is not None
    values = {"prompt": "{} is", "subject": "Ann", "target_new": "tall"} | request
    return store.key(EditRequest(**values))


def hparams(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, hparams=plan.hparams.model_copy(update=changes))


def targets_config(plan: Plan, **changes: Any) -> Plan:
    targets = plan.job.targets.model_copy(update=changes)
    return replace(plan, job=plan.job.model_copy(update={"targets": targets}))


def test_a_key_follows_all_that_a_target_depends_on(plan: Plan) -> None:
    keys = [
        key(plan),
        key(plan, prompt="{} was"),
        key(plan, subject="Bob"),
        key(plan, target_new="small"),
        key(plan, separator=""),
        key(plan, separator=": "),
        key(plan, [["{}"], ["Now. {}"]]),
        key(replace(plan, digests={**plan.digests, "model": "other"})),
        key(targets_config(plan, dtype="bfloat16")),
        key(hparams(plan, v_lr=0.4)),
        key(hparams(plan, v_num_grad_steps=3)),
        key(hparams(plan, layers=plan.hparams.layers[:-1])),
    ]
    assert len(set(keys)) == len(keys)


def test_a_key_follows_nothing_else(plan: Plan) -> None:
    for other in (
        key(plan, case_id=3, target_true="old", paraphrase_prompts=("Ann must be",)),
        key(targets_config(plan, dtype="float32")),
        key(targets_config(plan, workers=7, batch_size=3, shard_size=9, store="elsewhere")),
        key(hparams(plan, mom2_update_weight=7.0)),
        key(hparams(plan, layers=plan.hparams.layers[-1:])),
    ):
        assert other == key(plan)


def test_a_target_after_a_space_is_never_taken_for_one_without(plan: Plan) -> None:
    chinese = {"prompt": "{}的首都是", "subject": "中国", "target_new": "纽约"}
    # A key of an older release, which put a space in front of every target.
    assert key(plan, **chinese) != key(plan, **chinese, separator=" ")
    assert key(plan, separator=" ") == key(plan)


def test_a_job_without_a_store_has_none(plan: Plan) -> None:
    assert TargetStore.of(targets_config(plan, store=None), [["{}"]]) is None


def test_a_shared_target_is_kept_under_all_that_it_says(tmp_path: Path) -> None:
    store = opened(str(tmp_path))
    ann, bob, other = (
        EditRequest(prompt, "Ann", target)
        for prompt, target in (("{} is", "tall"), ("{} lives in", "Rome"), ("{} eats", "fish"))
    )
    alone = [store.key(request) for request in (ann, bob, other)]
    assert store.keys([ann, bob, other], [0, 1, 2]) == alone
    keys = store.keys([ann, bob, other], [0, 0, 2])
    assert keys[2] == alone[2]
    assert len({*keys, *alone}) == 5
    assert store.keys([bob, ann], [0, 0]) == keys[1::-1]
    assert not {*store.keys([ann, bob, other], [0, 0, 0])} & {*keys, *alone}
