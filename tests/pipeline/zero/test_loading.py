"""Loading partitioned weights: the memory it takes, in a process that has only its own.

`tests.pipeline.zero.test_slices` has what is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.cluster.rank_group import RankGroup, Rendezvous
from pipeline.cluster.session import ray_session
from pipeline.zero.loading import load_partitioned
from pipeline.zero.slices import init_rank
from tests.conftest import GOLDEN


@pytest.fixture
def cold_ray(ray_of_process: ExitStack, cold_python: None) -> Iterator[None]:
    """A Ray session whose processes are not forked from one that has used memory before."""
    ray_of_process.close()
    with ray_session("local", num_cpus=2):
        yield


class Rank:
    """Holds a partitioned model, and measures its process."""

    def __init__(self, meeting: Rendezvous) -> None:
        init_rank(*meeting, device="cpu", timeout_s=60.0)

    def _use(self, path: str) -> None:
        self._module, self._engine = load_partitioned(path, dtype=torch.float32)
        with torch.no_grad():
            self._engine.module(input_ids=torch.arange(3, 15).view(2, 6))

    def peak_of_loading_and_running(self, path: str) -> int:
        """Return the peak memory in bytes, beyond that of the libraries."""
        self._use(str(GOLDEN / "llama" / "model"))
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _peak()
        self._use(path)
        return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks anew")
def test_a_rank_holds_its_slices_and_little_else(cold_ray: None, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="150MB")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    del model
    with RankGroup(Rank, ranks=2, threads=1, deadline_s=120.0) as pair:
        peaks = pair.call_all("peak_of_loading_and_running", str(tmp_path))
    assert whole > 350 << 20
    # One read; a gathered weight and its receive buffer; small blocks kept by the allocator. The
    # whole model would take twice as much on top.
    room = (72 << 20) + 2 * largest
    assert all(whole / 2 < peak < whole / 2 + room for peak in peaks), (whole, peaks)
