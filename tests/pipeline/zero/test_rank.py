"""The update on partitioned weights compared with the plain one, for few and many requests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.cluster.rank_group import RankGroup, Rendezvous
from pipeline.data.tables import targets_table
from pipeline.second_moments import factors
from pipeline.second_moments.factors import FactorFile
from pipeline.storage.store import Store
from pipeline.workers.serial_executor import SerialRank
from pipeline.zero.rank import LayerReport, UpdateJob, UpdateRank, UpdateShard
from pmet import Edit, EditRequest
from pmet.model.architecture import resolve
from pmet.reference import plain_deltas
from pmet.update.solver import Factor, moment_factor
from tests.conftest import GOLDEN, Golden, load_golden

KEY_WIDTH = 256
# Float32 keys from batches of other shapes, amplified by the condition of KᵀK + λC.
DELTA = 2e-5


def few_contexts(family: str) -> Golden:
    """A golden problem with two generated contexts of five: keys are read in half the time."""
    golden = load_golden(family)
    plain, generated = golden.context_templates
    return replace(golden, context_templates=[plain, generated[:2]])


def many_requests() -> list[EditRequest]:
    """More requests than the golden models' keys have dimensions."""
    facts = json.loads((GOLDEN / "facts.json").read_text())
    prompts = ("{} is", "They say that {} is", "In the old city {} is")
    return [
        EditRequest(prompt, fact["subject"], fact["target_new"])
        for prompt in prompts
        for fact in facts
    ][: KEY_WIDTH + 8]


def targets_of(golden: Golden, requests: list[EditRequest]) -> torch.Tensor:
    """Random targets of about the size of values."""
    expected = golden.expected["targets"]
    noise = torch.randn(
        len(requests), expected.shape[1], generator=torch.Generator().manual_seed(0)
    )
    return expected.mean(0) + noise * expected.std(0)


def shards_of(store: Store, requests: list[EditRequest], targets_EV: torch.Tensor) -> list[Any]:
    """Uneven shards: one for each of three ranks."""
    edges = [0, 7, 7 + len(requests) // 2, len(requests)]
    shards = []
    for number, (start, stop) in enumerate(pairwise(edges)):
        name, rows = f"targets/{number:05d}.parquet", list(range(start, stop))
        zeros = np.zeros(len(rows))
        table = targets_table(
            rows, targets_EV[start:stop].numpy(), zeros.astype(np.int32), zeros.astype(np.float32)
        )
        store.write_table(name, table)
        shards.append(UpdateShard(f"{number:05d}", requests[start:stop], rows, [name]))
    return shards


class Host:
    """A rank's process: it computes one job after another, because starting it takes seconds."""

    def __init__(self, meeting: Rendezvous) -> None:
        self._meeting = meeting

    def begin(self, job: UpdateJob, shards: list[Any]) -> None:
        self._rank = UpdateRank(self._meeting, job)
        self._rank.take_shards(shards)

    def edit_layer(self, index: int, held: LayerReport | None) -> LayerReport | None:
        return self._rank.edit_layer(index, held)


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[RankGroup]:
    """Three ranks: their number divides none of the weights evenly."""
    with RankGroup(Host, ranks=3, threads=1) as group:
        yield group


Outcome = tuple[dict[str, torch.Tensor], list[LayerReport]]


def updated(
    golden: Golden,
    group: RankGroup | None,
    requests: list[EditRequest],
    targets_EV: torch.Tensor,
    folder: Path,
) -> Outcome:
    """Return deltas by parameter, and reports, of a group or of one rank without DeepSpeed."""
    moments, run = folder / "moments", folder / ("here" if group is None else "ranks")
    moments.mkdir(exist_ok=True)
    module = str(golden.hparams.down_projection_template)
    named = {module.format(layer): m for layer, m in golden.second_moments.items()}
    save_file(named, str(moments / "second_moments.safetensors"))
    store = Store(str(run))
    job = UpdateJob(
        model=str(GOLDEN / golden.family / "model"),
        layout=resolve(golden.model, golden.hparams),
        hparams=golden.hparams,
        templates=golden.context_templates,
        second_moments=str(moments),
        run=store,
        device="cpu",
        dtype=golden.model.dtype,
        stored=dict.fromkeys(golden.hparams.layers, golden.model.dtype),
        offload="none",
    )
    shards = shards_of(store, requests, targets_EV)
    if group is None:
        reports = alone(job, shards)
    else:
        ranks = group.size
        args = [(job, shards[rank::ranks]) for rank in range(ranks)]
        group.call_each("begin", args)
        reports = edited(job, group)
    edits = [Edit.load(run / report.file) for report in reports]
    return {name: delta for edit in edits for name, delta in edit.deltas.items()}, reports


def alone(job: UpdateJob, shards: list[Any]) -> list[Any]:
    with SerialRank(UpdateRank, (job,)) as rank:
        rank.call_all("take_shards", shards)
        return edited(job, rank)


def edited(job: UpdateJob, group: RankGroup | SerialRank) -> list[LayerReport]:
    """The reports of all layers, which are solved for in turn as often as the job says."""
    reports: list[LayerReport | None] = [None] * len(job.hparams.layers)
    for turn in range(job.hparams.solves):
        for index, held in enumerate(reports):
            assert (held.solves if held else 0) == turn
            reports[index], *others = group.call_all("edit_layer", index, held)
            assert not any(others)
    return [report for report in reports if report]


def assert_plain_deltas(
    golden: Golden,
    outcome: Outcome,
    requests: list[EditRequest],
    targets_EV: torch.Tensor,
    form: str,
    bound: float = DELTA,
) -> None:
    """Assert that an update is that of the plain form, and that its reports are right."""
    deltas, reports = outcome
    plain = plain_deltas(
        golden.model,
        golden.tokenizer,
        requests,
        golden.hparams,
        golden.context_templates,
        golden.second_moments,
        targets_EV,
    )
    assert deltas.keys() == plain.keys()
    for name, expected in plain.items():
        assert (deltas[name] - expected).norm() <= bound * expected.norm(), name
    assert {report.form for report in reports} == {form}
    assert all(report.requests == len(requests) and report.jitter == 0 for report in reports)
    # Float32 keeps 24 bits of a weight, and Δ is smaller than the weight.
    least = 0 if golden.model.dtype == torch.float32 else -1
    assert all(least < report.rounding < 1e-3 for report in reports)


@pytest.mark.parametrize(("spread", "many"), [("linear", True), ("none", False)])
def test_the_residual_is_spread_as_the_hyper_parameters_say(
    spread: str, many: bool, tmp_path: Path
) -> None:
    published = few_contexts("gpt2")
    requests = many_requests() if many else published.requests
    targets_EV = targets_of(published, requests)
    hparams = published.hparams.model_copy(update={"spread": spread})
    golden = replace(published, hparams=hparams)
    outcome = updated(golden, None, requests, targets_EV, tmp_path)
    assert_plain_deltas(golden, outcome, requests, targets_EV, "keys" if many else "requests")


@pytest.mark.parametrize("share", [None, 0.1])
@pytest.mark.parametrize("many", [True, False])
def test_further_solves_are_those_of_the_plain_form(
    many: bool, share: float | None, tmp_path: Path
) -> None:
    published = few_contexts("gpt2")
    requests = many_requests() if many else published.requests
    targets_EV = targets_of(published, requests)
    update = {"solves": 3 if share is None else 2, "mom2_update_share": share}
    hparams = published.hparams.model_copy(update=update)
    # In float64, where rounding does not grow from solve to solve.
    golden = replace(published, hparams=hparams, model=deepcopy(published.model).double())
    outcome = updated(golden, None, requests, targets_EV, tmp_path)
    form = "keys" if many else "requests"
    assert_plain_deltas(golden, outcome, requests, targets_EV, form, bound=1e-9)
    check_originals(golden, outcome[1], tmp_path / "here")


def check_originals(golden: Golden, reports: list[LayerReport], run: Path) -> None:
    """The saved edits are against the base, whatever the weights were before the last solve."""
    weights = dict(golden.model.named_parameters())
    for report in reports:
        edit = Edit.load(run / report.file)
        assert torch.equal(edit.originals[report.parameter], weights[report.parameter])
        assert report.weight_norm == pytest.approx(weights[report.parameter].norm().item())
        assert report.delta_norm == pytest.approx(edit.deltas[report.parameter].norm().item())


# One rank on DeepSpeed and two ranks are in `tests.e2e.test_run` and `tests.e2e.test_resume`.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "solves", "share"), [("gpt2", 1, None), ("gpt2", 2, 0.1), ("gptj", 2, None)]
)
def test_ranks_find_the_deltas_of_the_plain_form(
    family: str, solves: int, share: float | None, group: RankGroup, tmp_path: Path
) -> None:
    published, requests = few_contexts(family), many_requests()
    update = {"solves": solves, "mom2_update_share": share}
    golden = replace(published, hparams=published.hparams.model_copy(update=update))
    targets_EV = targets_of(golden, requests)
    outcome = updated(golden, group, requests, targets_EV, tmp_path)
    # Rounding in one solve changes the keys of the next.
    assert_plain_deltas(golden, outcome, requests, targets_EV, "keys", bound=solves * DELTA)
    check_originals(golden, outcome[1], tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_few_requests_are_solved_with_factors_that_are_kept_for_the_next_job(
    family: str, group: RankGroup, tmp_path: Path
) -> None:
    golden = few_contexts(family)
    requests, targets_EV = golden.requests, targets_of(golden, golden.requests)
    first = updated(golden, None, requests, targets_EV, tmp_path)
    files = sorted((tmp_path / "moments" / "factors").iterdir())
    assert len(files) == len(golden.hparams.layers)
    times = [file.stat().st_mtime_ns for file in files]
    # A damaged factor is recomputed and never used.
    files[0].write_bytes(files[0].read_bytes()[:-100])
    again = updated(golden, group, requests, targets_EV, tmp_path)
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    for name, delta in first[0].items():
        assert (again[0][name] - delta).norm() <= 1e-6 * delta.norm()
    assert_plain_deltas(golden, again, requests, targets_EV, "requests")


def test_nothing_is_put_beside_a_file_of_second_moments(tmp_path: Path) -> None:
    moment_KK = torch.eye(3)
    kept = FactorFile(str(tmp_path / "moments.safetensors"), "h.0.mlp", moment_KK)
    assert not kept.exists()
    assert not kept.keep(moment_factor(moment_KK))
    assert not list(tmp_path.iterdir())


def test_a_factor_is_found_by_the_numbers_it_belongs_to(tmp_path: Path) -> None:
    moment_KK = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    kept = FactorFile(str(tmp_path), "h.0.mlp", moment_KK)
    assert kept.keep(moment_factor(moment_KK))
    again = FactorFile(str(tmp_path), "h.0.mlp", moment_KK.clone())
    assert again.exists()
    assert torch.equal(again.read().lower, moment_factor(moment_KK).lower)
    assert not FactorFile(str(tmp_path), "h.0.mlp", moment_KK + 1e-6).exists()
    assert not FactorFile(str(tmp_path), "h.1.mlp", moment_KK).exists()


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e300, 0.0, 1.001])
@pytest.mark.parametrize("place", ["lower", "jitter"])
def test_a_factor_with_an_odd_number_is_computed_anew(
    tmp_path: Path, odd: float, place: str
) -> None:
    moment_KK = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    sound = moment_factor(moment_KK)
    lower_KK = sound.lower.clone()
    if place == "lower":
        lower_KK[1, 0] = odd
    kept = FactorFile(str(tmp_path), "h.0.mlp", moment_KK)
    assert kept.keep(Factor(lower_KK, odd or 0.5 if place == "jitter" else 0.0))
    assert torch.equal(kept.read().lower, sound.lower)
    assert kept.read().jitter == 0.0


def test_a_factor_with_a_jitter_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment_KK = torch.diag(torch.tensor([1.0, 1.0, 1.0, -5e-13]))
    made = moment_factor(moment_KK)
    assert made.jitter > 0
    kept = FactorFile(str(tmp_path), "h.0.mlp", moment_KK)
    kept.keep(made)
    monkeypatch.setattr(factors, "moment_factor", None)
    assert torch.equal(kept.read().lower, made.lower)
    assert kept.read().jitter == made.jitter
