"""How much text second moments need, for the form of the solve that a job uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cluster.pool import SerialPool, run_all
from pipeline.errors import JobError
from pipeline.progress import Stage
from pipeline.second_moments.amount import (
    checked_factor,
    factors_second_moments,
    few,
    refuse_too_few,
)
from pipeline.second_moments.collection import collect, plan_statistics
from pipeline.storage.store import Store
from pipeline.workers.worker import ModelWorker
from pmet.model.architecture import resolve
from pmet.model.experts import Stacked
from tests.conftest import GOLDEN, load_golden

LAYOUT = replace(
    resolve(load_golden("gpt2").model, load_golden("gpt2").hparams), key_width=100, value_width=50
)
MANY = 1000


def test_fewer_tokens_than_a_key_is_wide_are_refused() -> None:
    for requests in (None, 1):
        refuse_too_few(100, LAYOUT, requests)
        with pytest.raises(JobError, match=r"99 tokens.* at least 100 .* 200 to 1,000 are enough"):
            refuse_too_few(99, LAYOUT, requests)


def test_keys_of_many_facts_make_up_for_missing_tokens() -> None:
    """The key form needs only the sum of both to be positive definite."""
    assert not factors_second_moments(LAYOUT, MANY)
    assert factors_second_moments(LAYOUT, 1)
    refuse_too_few(10, LAYOUT, MANY)
    with pytest.raises(JobError, match="10 tokens"):
        refuse_too_few(10, LAYOUT, None)


def test_tokens_up_to_twice_the_width_are_warned_about() -> None:
    assert few(200, LAYOUT) is None
    assert few(199, LAYOUT) == (
        "corpus: it has only 199 tokens for keys that are 100 wide, so the second moments are "
        "imprecise, and the edit may damage what the model knows; 200 to 1,000 tokens are enough"
    )


def test_experts_count_the_tokens_that_reach_them() -> None:
    stacked = Stacked("down_proj", transposed=False, per_token=2)
    family = replace(LAYOUT.family, stacked=stacked)
    layout = replace(LAYOUT, experts=8, family=family)
    for requests in (None, 1, MANY):
        assert not factors_second_moments(layout, requests or 1)
        refuse_too_few(400, layout, requests)
        with pytest.raises(
            JobError,
            match=r"399 tokens, too few .* each of 8 experts sees about 99 of them, and its keys "
            r"are 100 wide, so at least 400 tokens are needed, and 800 to 4,000 are enough",
        ):
            refuse_too_few(399, layout, requests)
    assert few(800, layout) is None
    warning = few(799, layout)
    assert warning is not None
    assert "of which each of 8 experts sees about 199, for keys that are 100 wide" in warning


def test_a_second_moment_of_too_low_a_rank_is_refused() -> None:
    keys = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(JobError) as caught:
        checked_factor("stats/here", "h.3.mlp", keys.T @ keys)
    assert str(caught.value).startswith(
        "second_moments: h.3.mlp of stats/here cannot be used: C is not positive definite (leading "
    )
    assert "at least 80 tokens, better 400, of varied text" in str(caught.value)
    assert checked_factor("here", "h", torch.eye(3)).jitter == 0


def test_uniform_text_is_refused_when_it_has_been_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["Sur Bavov works as a baker."] * 90}), tmp_path / "c.parquet")
    job = plan_statistics(
        str(GOLDEN / "gpt2" / "model"),
        [str(tmp_path / "c.parquet")],
        load_golden("gpt2").hparams,
        tokens=1_000_000,
        max_length=64,
        on_gpu=False,
    )
    assert job.warning is None
    with (
        SerialPool(ModelWorker, init_args=(job.source,), threads=1) as pool,
        pytest.raises(JobError, match="of this corpus cannot be used: C is not positive definite"),
    ):
        collect(
            job,
            Store(tmp_path / "out"),
            lambda method, tasks, take: run_all(pool, method, tasks, take),
            Stage(),
            lambda module, moment_KK: checked_factor("this corpus", module, moment_KK),
        )
    assert not list((tmp_path / "out").glob("second_moments.*on"))
    assert not (tmp_path / "out" / "second_moments.safetensors").exists()
