"""Time of the update on partitioned weights, and the peak memory of each process.

python -m benchmarks.ranks                         # a model large enough to compare processes
python -m benchmarks.ranks --tiny --counts 1000 100000   # many requests

The model is a Llama with random weights; requests and targets are generated. Everything else is as
in a job: it is planned from Parquet, its targets are in the run folder, its ranks are Ray actors.
Each row of the table is a separate process that starts Ray and the ranks anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import HERE, show
from pipeline.cluster import RankGroup
from pipeline.data import targets_table
from pipeline.job import JobConfig
from pipeline.models import open_tokenizer
from pipeline.plan import make_plan
from pipeline.progress import Progress
from pipeline.run_folder import RunFolder
from pipeline.stages import Context, FoundTargets, update_layers
from pipeline.workers import RayExecutor

TEMPLATES = [["{}"], ["It is well known. {}", "In the year of the flood. {}"]]
LAYERS = (1, 2)
HPARAMS = {
    "layers": LAYERS,
    "v_num_grad_steps": 1,
    "v_lr": 0.1,
    "v_loss_layer": None,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 1,
    "kl_factor": 0,
    "mom2_update_weight": 10,
}
MIB = 2**20
_TICK_S = 0.1


def main() -> None:
    """Run the update for each number of ranks and of requests, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[64], help="numbers of requests")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--width", type=int, default=1536, help="width of the model")
    parser.add_argument("--key-width", type=int, default=6144)
    parser.add_argument("--depth", type=int, default=12, help="layers")
    parser.add_argument("--tiny", action="store_true", help="width 64, key width 256, depth 4")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    if options.tiny:
        options.width, options.key_width, options.depth = 64, 256, 4
    with tempfile.TemporaryDirectory() as folder:
        parameters = _make_model(Path(folder) / "model", options)
        rows = [
            _in_a_fresh_process(Path(folder), options, ranks, count)
            for ranks in options.ranks
            for count in options.counts
        ]
    k, v = options.key_width, options.width
    # KᵀK, the factor and RᵀK in float64, C in float32.
    sums = (8 * k * k * 2 + 8 * k * v + 4 * k * k) / MIB
    note = f"weights {4 * parameters / MIB:.0f} MiB, an edited one {4 * k * v / MIB:.0f} MiB; "
    note += f"sums, factor and C of the key form {sums:.0f} MiB"
    show(
        f"update of {len(LAYERS)} layers, {parameters / 1e6:.3g} M parameters", rows, options, note
    )


def _make_model(folder: Path, options: argparse.Namespace) -> int:
    """Write a checkpoint and its second moments; return the number of parameters."""
    tokenizer = open_tokenizer(str(HERE / "model"))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        intermediate_size=options.key_width,
        num_hidden_layers=options.depth,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="1GB")
    moments = folder.parent / "moments"
    moments.mkdir()
    noise = torch.randn(options.key_width, options.key_width).div_(options.key_width**0.5)
    moment_KK = (noise + noise.T).div_(8)
    moment_KK.diagonal().add_(1.0)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in LAYERS]
    save_file({name: moment_KK.clone() for name in names}, moments / "second_moments.safetensors")
    return sum(parameter.numel() for parameter in model.parameters())


def _in_a_fresh_process(
    folder: Path, options: argparse.Namespace, ranks: int, count: int
) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        return one.submit(_measured, folder, options.width, ranks, count).result()


def _measured(folder: Path, width: int, ranks: int, count: int) -> dict[str, Any]:
    requests = folder / f"requests-{count}.parquet"
    pq.write_table(_requests(count), requests)
    hparams = folder / "hparams.json"
    hparams.write_text(json.dumps(HPARAMS))
    templates = folder / "templates.json"
    templates.write_text(json.dumps(TEMPLATES))
    job = JobConfig(
        model=str(folder / "model"),
        requests=(str(requests),),
        output=str(folder / f"run-{ranks}-{count}"),
        hparams=str(hparams),
        second_moments=str(folder / "moments"),
        context_templates=str(templates),
        update={"ranks": ranks},
    )
    start = time.perf_counter()
    plan = make_plan(job)
    planned = time.perf_counter() - start
    run_folder = RunFolder(job.output)
    run_folder.begin(plan.digests, seed=0)
    found = FoundTargets()
    for shard in plan.target_shards:
        rows = list(plan.table.rows[shard.start : shard.stop])
        values = np.random.default_rng(shard.index).normal(size=(len(rows), width))
        zeros = np.zeros(len(rows))
        table = targets_table(
            rows, values.astype(np.float32), zeros.astype(np.int32), zeros.astype(np.float32)
        )
        found.files[shard.index] = f"targets/{shard.name}.parquet"
        run_folder.store.write_table(found.files[shard.index], table)
    progress = Progress()
    with (
        RayExecutor(plan, "local", lambda *_, **__: None) as executor,
        _peaks() as peaks,
        mock.patch("pipeline.workers.ray_executor.RankGroup", _TimedGroup),
    ):
        context = Context(plan, run_folder, executor, progress)
        start = time.perf_counter()
        reports = update_layers(context, TEMPLATES, found)
        seconds = time.perf_counter() - start
    layers = _TimedGroup.seconds["edit_layer"]
    return {
        "ranks": ranks,
        "requests": count,
        "form": reports[0].form,
        "plan, ms/request": 1e3 * planned / count,
        "update, s": seconds,
        "layers, s": layers,
        "layers, ms/request": 1e3 * layers / count,
        "largest rank, MiB": max(peaks.values()),
        "driver, MiB": _peak(psutil.Process().pid),
    }


class _TimedGroup(RankGroup):
    """A group of ranks that measures the time of its calls, without its start-up."""

    seconds: ClassVar[Counter[str]] = Counter()

    def call_all(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """Call the group's method and add up the time."""
        start = time.perf_counter()
        replies = super().call_all(method, *args, deadline_s=deadline_s)
        self.seconds[method] += time.perf_counter() - start
        return replies


def _requests(count: int) -> pa.Table:
    prompts = ("{} works as", "In the old city {} is known as", "They say that {} became")
    return pa.table(
        {
            "prompt": [prompts[i % len(prompts)] for i in range(count)],
            "subject": [f"Person number {i} of the valley" for i in range(count)],
            "target_new": [("a baker", "a smith", "an astronomer")[i % 3] for i in range(count)],
        }
    )


@contextmanager
def _peaks() -> Iterator[dict[int, int]]:
    """Collect the peak memory of each rank by process, in MiB; complete when the block ends."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_TICK_S):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "_RankProcess" in " ".join(process.cmdline()):
                        peaks[process.pid] = _peak(process.pid)
                except (psutil.Error, OSError):
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _peak(pid: int) -> int:
    """Return the peak resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


if __name__ == "__main__":
    main()
