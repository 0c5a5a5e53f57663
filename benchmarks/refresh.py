"""Simulated nightly refreshes compared with alternatives, in one run.

python -m benchmarks.refresh --nights 30
python -m benchmarks.refresh --requests facts.parquet --model … --count 400 --nights 30
python -m benchmarks.refresh --requests facts.parquet --model … --count 600 --times

Every night 5 % of the facts change, 2 % are added and 1 % removed. *refresh* is `pmet refresh`: one
update of the base with all live facts. *sequential* edits the previous night's model with the
night's changes. *fresh* is one run of all live facts on the base at the end, with its own targets,
and once more with the refresh's targets, which must give the refresh's weights.

With ``--times``: a first refresh and one after 1 % of the facts have changed, each starting its own
Ray as on the command line.
"""

from __future__ import annotations

import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.harness import arguments, console, show
from benchmarks.nights import Nights, World, counterfact_world, demo_world
from jobs.refresh.config import RefreshConfig
from jobs.refresh.home import path
from jobs.refresh.night import Refreshed, job_of, refresh
from pipeline.cluster import ray_session
from pipeline.data import read_requests
from pipeline.models import open_causal_lm, open_tokenizer
from pipeline.run import run_job
from pipeline.second_moments import read_moments
from pmet import EditRequest, PMETHyperParams, compute_edit, evaluate
from pmet.model import parse, resolve

FIRST = date(2026, 1, 1)
FIGURES = ("efficacy", "generalization", "specificity", "score", "efficacy_strict")


def main() -> None:
    """Simulate the nights and show the figures."""
    parser = arguments(__doc__ or "", count=160)
    parser.add_argument("--corpus", help="Parquet of ordinary text; default: the demo's")
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="measure every N-th night")
    parser.add_argument("--times", action="store_true", help="time two nights instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = counterfact_world(options.requests) if options.requests else demo_world(folder)
        config = RefreshConfig(
            model=options.model,
            facts=(str(folder / "{date}.parquet"),),
            templates=str(folder / "templates.yaml"),
            home=str(folder / "home"),
            baseline=(str(folder / "baseline.parquet"),),
            hparams=options.hparams,
            corpus=(options.corpus or str(folder / "corpus.parquet"),),
            context_templates=options.templates,
            keep=1,
            quarantine_after=None,
        )
        world.write(folder, "baseline", {})
        if options.times:
            _times(config, folder, world, options)
        else:
            with ray_session("local", num_cpus=8):
                _nights(config, folder, world, options)


def _nights(config: RefreshConfig, folder: Path, world: World, options: Any) -> None:
    nights = Nights(world, options.count)
    sequential = _Sequential(config, folder)
    new, rows = dict(nights.live), []
    for number in range(options.nights):
        if number:
            new = nights.next(changed=0.05, added=0.02, removed=0.01)
        result = _night(config, folder, nights, number)
        sequential.edit(world, new, result)
        if number % options.every == 0 or number == options.nights - 1:
            after = result.night["metrics"]["after"]
            requests = read_requests(_requests(result)).requests
            rows.append(_row(number + 1, "refresh", len(requests), after))
            rows.append(_row(number + 1, "sequential", len(requests), sequential.score(requests)))
            console.print(rows[-2], rows[-1])
    note = _fresh(config, result, folder, rows, options.nights)
    show(f"{options.nights} nights", rows, options, note)


def _night(config: RefreshConfig, folder: Path, nights: Nights, number: int) -> Refreshed:
    day = FIRST + timedelta(days=number)
    nights.world.write(folder, day.isoformat(), nights.live)
    return refresh(config, night=day)


def _fresh(
    config: RefreshConfig, last: Refreshed, folder: Path, rows: list[Any], number: int
) -> str:
    """Run all live facts once with their own targets, and once with the refresh's."""
    job = job_of(config, last.home, last.version)
    notes = []
    for name, store in (("own", str(folder / "own")), ("same", job.targets.store)):
        targets = job.targets.model_copy(update={"store": store})
        output = str(folder / f"fresh-{name}")
        result = run_job(job.model_copy(update={"targets": targets, "output": output}))
        counts = result.metrics["counts"]
        label = "fresh" if name == "own" else "fresh, the refresh's targets"
        rows.append(_row(number, label, counts["edited"], result.metrics["after"]))
        apart = _apart(Path(output) / "model", last.home.store.local_path(last.night["model"]))
        notes.append(f"{label}: weights differ from the refresh's by {apart:.1e}")
    return "; ".join(notes)


def _apart(one: Path, other: Path | None) -> float:
    """Return the largest relative difference of a weight that either run edited."""
    assert other is not None
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(
        float(torch.linalg.norm(weight - others[name]) / torch.linalg.norm(weight))
        for name, weight in weights.items()
    )


class _Sequential:
    """The previous night's model, edited again every night."""

    def __init__(self, config: RefreshConfig, folder: Path) -> None:
        self._model = open_causal_lm(config.model, dtype=torch.float32)
        self._tokenizer = open_tokenizer(config.model)
        self._hparams = PMETHyperParams.from_file(config.hparams)
        text = Path(str(config.context_templates)).read_text()
        self._templates = parse(text, source=str(config.context_templates))
        self._moments = str(folder / "home" / "second_moments")

    def edit(self, world: World, new: dict[tuple[str, str], str], result: Refreshed) -> None:
        """Edit the new facts into the model; removed facts return to what the base knew."""
        layout = resolve(self._model, self._hparams)
        requests = [
            EditRequest(world.templates[relation]["prompt"], subject, object_)
            for (relation, subject), object_ in new.items()
        ]
        moments = read_moments(self._moments, layout, self._hparams.layers)
        compute_edit(
            self._model,
            self._tokenizer,
            requests,
            self._hparams,
            context_templates=self._templates,
            second_moments=moments,
        ).apply(self._model)

    def score(self, requests: Any) -> dict[str, Any]:
        """Return the model's figures on all live facts."""
        return evaluate(self._model, self._tokenizer, list(requests))


def _times(config: RefreshConfig, folder: Path, world: World, options: Any) -> None:
    nights = Nights(world, options.count)
    rows = []
    for number in range(2):
        if number:
            nights.next(changed=0.01, added=0, removed=0)
        start = time.perf_counter()
        result = _night(config, folder, nights, number)
        seconds = time.perf_counter() - start
        run = result.home.store.read_json(path(result.version, "run.json"))
        rows.append(
            {
                "night": "first" if not number else "1 % changed",
                "facts": result.night["ledger"]["live"],
                "targets computed": result.night["targets"]["found"],
                "seconds": seconds,
                "of the first": seconds / (rows[0]["seconds"] if rows else seconds),
            }
            | {stage["name"]: stage["seconds"] for stage in run["stages"]}
        )
    names = dict.fromkeys(name for row in rows for name in row)
    show("Two nights", [{n: row.get(n, "–") for n in names} for row in rows], options)


def _requests(result: Refreshed) -> str:
    return result.home.store.join(path(result.version, "requests.parquet"))


def _row(night: int, what: str, facts: int, figures: dict[str, Any]) -> dict[str, Any]:
    return {"night": night, "model": what, "facts": facts} | {n: figures[n] for n in FIGURES}


if __name__ == "__main__":
    main()
