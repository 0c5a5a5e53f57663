"""The store of targets: time to write and look up a large job's targets.

python -m benchmarks.target_store --entries 100000 --width 4096
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import show, timed
from pipeline.data import TargetArrays
from pipeline.stages import TargetStore
from pipeline.storage import Store
from pmet import EditRequest


def main() -> None:
    """Write segments; look up all targets, one in a hundred, and missing ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = TargetStore(Store(folder), {"model": "benchmark"}, options.width)
        requests = [EditRequest("{} is", f"subject {n}", "new") for n in range(options.entries)]
        seconds, _ = timed(lambda: fill(store, requests, options.segment, random))
        rows = [{"what": "write all", "seconds": seconds, "found": ""}]
        strangers = [EditRequest("{} was", r.subject, "new") for r in requests]
        for what, wanted in (
            ("look up, all missing", strangers),
            ("look up one in a hundred", requests[::100]),
            ("look up all", requests),
        ):
            seconds, found = timed(lambda wanted=wanted: count(store, wanted))  # type: ignore[misc]
            rows.append({"what": what, "seconds": seconds, "found": found})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    title = f"{options.entries} targets of {options.width}, segments of {options.segment}"
    show(f"{title}, peak {peak} MiB", rows, options)


def fill(
    store: TargetStore, requests: list[EditRequest], size: int, random: np.random.Generator
) -> None:
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        values = random.standard_normal((len(part), store.width), np.float32)
        ones = np.ones(len(part))
        arrays = TargetArrays(np.arange(len(part)), values, ones.astype(np.int32), ones)
        store.write(part, arrays)


def count(store: TargetStore, requests: list[EditRequest]) -> int:
    with store.lookup([store.key(request) for request in requests]) as stored:
        return len(stored)


if __name__ == "__main__":
    main()
