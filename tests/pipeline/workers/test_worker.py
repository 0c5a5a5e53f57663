"""A worker's replica, on one device and on all devices of its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.tables import read_targets
from pipeline.evaluation.settings import How
from pipeline.models.source import ModelSource
from pipeline.storage.store import Store
from pipeline.workers.worker import Asked, ModelWorker, TargetTask
from pmet.evaluation.said import Questions
from tests import simulated
from tests.conftest import GOLDEN, load_golden

MODEL = str(GOLDEN / "llama" / "model")


def of_a_replica(source: ModelSource, output: Store) -> tuple[Any, ...]:
    """Return a replica's targets, scores and measurements for some requests."""
    golden = load_golden("llama")
    requests = golden.requests[:3]
    replica = ModelWorker(source)
    found = replica.find_targets(
        TargetTask(
            source=source,
            requests=requests,
            rows=[5, 6, 7],
            hparams=golden.hparams.model_copy(update={"v_num_grad_steps": 4}),
            templates=golden.context_templates,
            shared_keys="joint",
            batch_size=None,
            memory_share=1.0,
            output=output,
            name="shard",
        )
    )
    asked = Asked(
        [[(r.text, r.target_new)] for r in requests], questions=Questions([requests[0].text])
    )
    measured = replica.measure(source, How(), asked)
    targets = read_targets(output.read_table(found.file))
    return torch.tensor(targets.values), found.count, measured.answered, measured.scores


def test_several_gpus_hold_one_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Store(tmp_path)
    values, *others = of_a_replica(ModelSource(MODEL, on_gpu=False), output)
    with simulated.devices(2) as gpus:
        monkeypatch.setattr("pipeline.models.source.visible_gpus", lambda: gpus)
        for module in ("pipeline.models.source", "pmet.targets.memory"):
            monkeypatch.setattr(f"{module}.free_memory", lambda device: 1 << 30)
        opened, _ = ModelSource(MODEL, on_gpu=True).open()
        assert {weight.device for weight in opened.parameters()} == set(gpus)
        shared, count, answers, scores = of_a_replica(ModelSource(MODEL, on_gpu=True), output)
    assert [count, answers] == others[:2]
    # Other kernels than the CPU's own; four steps of Adam amplify the difference only slightly.
    torch.testing.assert_close(shared, values, rtol=1e-4, atol=1e-5)
    for (mine,), (reference,) in zip(scores, others[2], strict=True):
        assert mine.log_prob == pytest.approx(reference.log_prob, abs=1e-5)
