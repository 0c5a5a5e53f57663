"""The report of a large run: its size, its build time, and the time until a browser shows it.

    python -m benchmarks.report --count 10000

The run is synthetic: requests in relations, figures drawn with a seed, hostile text in every tenth
request. The browser is a headless Chromium or Chrome with an empty profile; its time is from the
start of the navigation until the page has been laid out and painted. Without a browser only size
and build time are measured.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.browser import Browser, find_browser
from benchmarks.harness import show, timed
from pipeline.evaluation import CORE
from pipeline.report import write_report
from pipeline.storage import Store

HOSTILE = (
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=alert(1)>\"'",
    "</svg></style><style>body { display: none }</style>",
    "{{ 7 * 7 }} {% raw %} ${x} $x^2$",
    "\u202eesrever\u202c \x00 \x1b[31m",
    "long " * 4000,
)
_METRICS = (*CORE, *(f"{name}_strict" for name in CORE))


def write_run(store: Store, count: int, *, relations: int = 34, hostile: bool = True) -> None:
    """Write the folder of a synthetic run of ``count`` requests."""
    draw = random.Random(0)
    evil = HOSTILE if hostile else ()

    def text(plain: str, i: int) -> str:
        return f"{plain} {evil[i // 10 % len(evil)]}" if evil and i % 10 == 0 else plain

    def share(neighbors: int, chance: float) -> float:
        return sum(draw.random() < chance for _ in range(neighbors)) / neighbors

    rows = range(count)
    figures = {f"before_{name}": [share(10, 0.2) for _ in rows] for name in _METRICS}
    figures |= {f"after_{name}": [share(10, 0.95) for _ in rows] for name in _METRICS}
    figures["before_specificity"] = [share(10, 0.9) for _ in rows]
    figures["after_specificity"] = [
        share(10, 0.8) if draw.random() < 0.4 else b for b in figures["before_specificity"]
    ]
    words = {
        "prompt": [text("The mother tongue of {} is", i) for i in rows],
        "subject": [text(f"Subject {i}", i + 1) for i in rows],
        "target_new": [text("French", i + 2) for i in rows],
        "status": ["edited"] * count,
        "before_answer": [text("English", i + 3) for i in rows],
        "after_answer": [text("French", i + 4) for i in rows],
        "before_text": [text("Subject was born in London and speaks English.", i) for i in rows],
        "after_text": [text("Subject was born in Paris and speaks French.", i) for i in rows],
    }
    course = {
        "row": list(rows),
        "case_id": list(rows),
        "steps": [min(25, 3 + int(draw.expovariate(0.25))) for _ in rows],
        "loss": [draw.expovariate(30.0) for _ in rows],
    }
    store.write_table("results.parquet", pa.table(course | words | figures))
    refused = [text("subject is empty", i) for i in range(count // 20)]
    store.write_table(
        "rejected.parquet",
        pa.table({"row": list(range(len(refused))), "prompt": refused, "reason": refused}),
    )
    store.write_json("metrics.json", _metrics(draw, count, len(refused), relations, evil))
    store.write_json("run.json", _status(count, evil))
    store.write_bytes(
        "job.yaml", b"model: EleutherAI/gpt-j-6b\nrequests: facts/*.parquet\nseed: 0\n"
    )


def _metrics(
    draw: random.Random, count: int, refused: int, relations: int, evil: tuple[str, ...]
) -> dict[str, Any]:
    def scores(low: float, high: float) -> dict[str, float]:
        return {name: draw.uniform(low, high) for name in _METRICS}

    def ends(values: dict[str, float]) -> dict[str, list[float]]:
        return {name: [max(0, v - 0.04), min(1, v + 0.03)] for name, v in values.items()}

    def extra(score: float, fluency: float, perplexity: float) -> dict[str, float]:
        accuracies = {f"{name}_accuracy": draw.uniform(0.3, 0.9) for name in CORE}
        return {"score": score, **accuracies, "portability": draw.uniform(0.2, 0.6)} | {
            "fluency": fluency,
            "consistency": draw.uniform(0.1, 0.5),
            "perplexity": perplexity,
        }

    before, after = scores(0.1, 0.3), scores(0.8, 0.98)
    groups = []
    for i in range(relations):
        b, a = scores(0.0, 0.4), scores(0.6, 1.0)
        name = f"P{17 + i}" if not evil or i % 7 else evil[i // 7 % len(evil)]
        intervals = {"before": ends(b), "after": ends(a)}
        size = max(1, count // relations)
        groups.append({"name": name, "requests": size, "before": b, "after": a} | {
            "intervals": intervals
        })  # fmt: skip
    gates = [
        {"name": "efficacy", "kind": "least", "threshold": 0.75, "value": 0.9, "passed": True},
        {"name": "specificity_drop", "kind": "drop", "threshold": 0.02, "value": 0.05,
         "passed": False},
        {"name": "perplexity_increase", "kind": "increase", "threshold": 0.02, "value": 0.013,
         "passed": True},
    ]  # fmt: skip
    return {
        "before": before | extra(0.25, 5.9, 11.1),
        "after": after | extra(0.9, 5.8, 11.3) | {"agreement": 0.97},
        "intervals": {"before": ends(before), "after": ends(after)},
        "groups": {"column": "relation_id", "rows": groups},
        "gates": gates,
        "counts": {"requested": count + refused, "rejected": refused, "edited": count},
    }


def _status(count: int, evil: tuple[str, ...]) -> dict[str, Any]:
    seconds = {"second moments": 605.0, "measure before": 130.0, "targets": 740.5, "update": 64.2}
    details = {"targets": {"found": count, "shards": 40}, "second moments": {"tokens": 1_000_000}}
    return {
        "status": "held",
        "started_at": "2026-11-23T02:00:00+00:00",
        "finished_at": "2026-11-23T02:27:30+00:00",
        "attempt": 2,
        "seed": 0,
        "machine": f"node-7 x86_64 Linux {evil[0] if evil else ''}",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"},
        "digests": {"job": "9bbb9308e014cc3d", "model": "d7d42f123bbed5bb"},
        "stages": [
            {"name": name, "seconds": s, "detail": details.get(name, {})}
            for name, s in seconds.items()
        ],
        "layers": [
            {"parameter": f"transformer.h.{i}.mlp.fc_out.weight", "delta_norm": i / 2.0,
             "weight_norm": 100.0, "requests": count}
            for i in range(3, 9)
        ],
        "events": [
            {"kind": "death", "text": "worker 3 was lost on shard 12: SIGKILL"},
            {"kind": "retry", "text": f"shard 12, attempt 2 {evil[1] if evil else ''}"},
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="number of requests")
    parser.add_argument("--relations", type=int, default=34)
    parser.add_argument("--repeat", type=int, default=5, help="how often to open the page")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            _row(Store(Path(folder) / str(count)), count, options)
            for count in (1, max(1, options.count // 10), options.count)
        ]
    note = "" if find_browser() else "There is no Chromium or Chrome here, so no page was opened."
    show("The report of a run", rows, options, note)


def _row(store: Store, count: int, options: argparse.Namespace) -> dict[str, Any]:
    write_run(store, count, relations=min(count, options.relations))
    seconds, _ = timed(lambda: write_report(store))
    row = {"requests": count, "MB": store.size("report.html") / 1e6, "build (s)": seconds}
    page, path = store.local_path("report.html"), find_browser()
    if page is None or path is None:
        return row
    with Browser(path) as browser:
        shown = [browser.open(page) for _ in range(options.repeat)]
        assert not browser.dialogs
        asked = {url for url in browser.requests if not url.startswith(("file:", "data:"))}
        assert not asked, asked
    return row | {
        "first opening (s)": shown[0],
        "slowest of the others (s)": max(shown[1:] or shown),
    }


if __name__ == "__main__":
    main()
