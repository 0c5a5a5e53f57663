"""Targets on a GPU at GPT-J-6B's shape: random weights, prompts as long as CounterFact's.

python -m benchmarks.gpu --count 512

It needs only the package ``pmet`` and its imports (torch, transformers, pydantic), no download and
no tokenizer files. Early stopping is off: every target takes all its evaluations. On a machine
without a GPU it runs on the CPU; use a small ``--layers`` and ``--width`` there.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.operations import matmul_rate, needed, synchronize
from pmet import EditRequest, PMETHyperParams, compute_targets
from pmet.model import share_out
from pmet.reference import plain_targets
from pmet.targets import optimization

# CounterFact's requests by their number of tokens from the subject's last one on.
SUFFIX_LENGTHS = {2: 26, 3: 38, 4: 45, 5: 32, 6: 27, 7: 18, 8: 7, 9: 3, 10: 3, 11: 1}
TEMPLATE_LENGTHS = (8, 10, 10, 12, 9)
VOCABULARY = 50_400


def main() -> None:
    """Time the batched form at several batch sizes and the plain form, in one run."""
    options = _options()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    _say(f"{_device_name(device)}, {versions}")
    model, tokenizer = _model(options, device, dtype), _tokenizer()
    hparams = PMETHyperParams.preset("gpt-j-6b").model_copy(
        update={"layers": options.edited, "v_num_grad_steps": options.steps, "v_loss_layer": None}
    )
    rng = random.Random(0)
    requests = [_request(rng) for _ in range(options.count)]
    templates = [["{}"], [f"{_words(rng, length)} . {{}}" for length in TEMPLATE_LENGTHS]]
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 1024, seconds=3)
    _say(f"{options.dtype} matrix products: {rate / 1e12:.4g} TFLOP/s")
    # No target may stop early.
    optimization.LOSS_ENOUGH = optimization.KL_ENOUGH = -1.0
    rows = []

    def measure(name: str, count: int, work: Callable[[list[EditRequest]], Any]) -> None:
        chosen = requests[:count]
        work(chosen[: min(4, count)])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        work(chosen)
        synchronize(device)
        seconds = time.perf_counter() - start
        operations = needed(
            model, tokenizer, chosen, hparams, templates, [options.steps] * len(chosen)
        )
        row = {
            "form": name,
            "targets": count,
            "targets/s": count / seconds,
            "of the matmul rate": operations / seconds / rate,
            "peak GiB": _peak(device),
        }
        rows.append(row)
        _say(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )

    def batched(size: int | None) -> Callable[[list[EditRequest]], Any]:
        return lambda chosen: compute_targets(
            model, tokenizer, chosen, hparams, context_templates=templates, batch_size=size
        )

    for size in options.batch_sizes:
        measure(f"batched, {size or 'auto'}", options.count, batched(size or None))
    measure(
        "plain",
        min(options.plain, options.count),
        lambda chosen: plain_targets(model, tokenizer, chosen, hparams, templates),
    )
    if options.profile:
        _profile(batched(options.batch_sizes[0] or None), requests, device)
    if options.output:
        figures = {
            "device": _device_name(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "matmul_tflops": rate / 1e12,
            "options": vars(options),
            "rows": rows,
        }
        options.output.write_text(json.dumps(figures, indent=2, default=str) + "\n")


def _options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to split the layers over")
    parser.add_argument("--layers", type=int, default=28, help="layers of the model")
    parser.add_argument("--width", type=int, default=4096, help="width of the model")
    parser.add_argument("--edited", type=int, nargs="+", default=[3, 4, 5, 6, 7, 8])
    parser.add_argument("--steps", type=int, default=30, help="evaluations per target")
    parser.add_argument("--count", type=int, default=512, help="targets")
    parser.add_argument("--plain", type=int, default=4, help="targets of the plain form")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[0, 64, 128, 256], help="0: auto"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    return parser.parse_args()


def _model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    config = transformers.GPTJConfig(
        n_layer=options.layers,
        n_embd=options.width,
        n_head=max(1, options.width // 256),
        rotary_dim=64,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    several = options.gpus > 1
    try:
        with torch.device("cpu") if several else device:
            model = transformers.GPTJForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    if several:
        share_out(model, [torch.device("cuda", number) for number in range(options.gpus)])
    return model


def _tokenizer() -> Any:
    """Return a tokenizer with one token per word, ``w0`` to the end of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


def _request(rng: random.Random) -> EditRequest:
    (suffix,) = rng.choices([*SUFFIX_LENGTHS], weights=[*SUFFIX_LENGTHS.values()])
    target = rng.choices([1, 2, 3], weights=[80, 6, 14])[0]
    # The suffix also holds the subject's last token and all target tokens except the last.
    behind = max(1, suffix - target)
    front = _words(rng, rng.randint(0, 3))
    subject = _words(rng, rng.randint(2, 5))
    prompt = f"{front} {{}} {_words(rng, behind)}".strip()
    return EditRequest(prompt, subject, _words(rng, target))


def _words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(1, VOCABULARY)}" for _ in range(count))


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _profile(
    work: Callable[[list[EditRequest]], Any], requests: list[EditRequest], device: torch.device
) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        work(requests[:64])
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    _say(seen.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
