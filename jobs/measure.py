"""``pmet evaluate``: measures a model on edit requests, in this process."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jobs.views import percent, plain, show_harness
from pipeline.data import read_corpus, read_requests
from pipeline.evaluation import ChatQuestions, How, figure_of, group_column, grouped, rounded
from pipeline.events import HARNESS, MEASURE
from pipeline.harness import (
    HarnessTasks,
    TaskScores,
    alone,
    compared,
    interval_of_mean,
    mean_of,
)
from pipeline.job import EvaluateConfig
from pipeline.models import (
    Checkpoint,
    ModelSource,
    check_readable,
    default_cache,
    open_fast_tokenizer,
    open_model_folder,
    open_skeleton,
)
from pipeline.places import model_places, pattern_places
from pipeline.progress import RichProgress
from pipeline.stages import (
    AskingHere,
    MeasurementMeter,
    answering,
    figures_of,
    harness_here,
    held_out,
    intervals_of,
    work_of_texts,
)
from pipeline.storage import Store, is_json_with, json_bytes, refuse_foreign_file, refuse_overlap
from pmet.errors import RequestError
from pmet.evaluation import ANSWERED, KINDS, Prompts
from pmet.model import context_length
from pmet.update import longest

SHOWN_GROUPS = 20
_Opened = tuple[Any, Any]
"""A model and its tokenizer."""


def evaluate_model(
    model: str,
    requests: Sequence[str],
    config: EvaluateConfig,
    *,
    seed: int,
    separator: str | None,
    corpus: Sequence[str] | None,
    base: str | None,
    output: Path | None,
    console: Console,
) -> None:
    """Measure a model on edit requests and print the figures.

    Raises:
        InputError: a model, the requests or the corpus cannot be read, no row is usable, or a
            requested figure cannot be measured.
    """
    if output is not None:
        output = output.expanduser()
        _refuse_output(output, model, requests, corpus or (), base)
    source = _source(model)
    tokenizer = open_fast_tokenizer(Path(source.folder))
    Prompts(tokenizer, config.chat_template)
    skeleton = open_skeleton(Path(source.folder))
    tasks = HarnessTasks.read(
        config.harness,
        tokenizer,
        chat=config.chat_template,
        longest=context_length(skeleton.config),
    )
    table = read_requests(requests, separator)
    for note in table.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    column = group_column(config.group_by, table.table.column_names)
    if not table.requests:
        raise RequestError(f"none of {len(table.table)} rows can be measured: all are invalid")
    chosen = list(range(len(table.requests)))
    if config.sample is not None and config.sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, config.sample)
    questions = ChatQuestions.read(config.questions)
    rows = [table.rows[place] for place in chosen]
    asked = [
        questions.to_ask(table.requests[place], row, table.table)
        for place, row in zip(chosen, rows, strict=True)
    ]
    opened_base = None if base is None else _source(base).open()
    base_scores = _abilities(tasks, opened_base)
    with RichProgress().stage(MEASURE) as bar:
        texts: list[str] = []
        if corpus:
            read = read_corpus(corpus, tokenizer, max_length=longest(skeleton.config))
            texts = held_out(read.texts, config.perplexity_texts, config.perplexity_tokens)
        scored = [*texts, *texts] if base is not None else texts
        work = work_of_texts(scored)
        answered = answering(len(asked), asked.__getitem__, config.answers, work, seed)
        meter = MeasurementMeter(bar, len(asked), scored)
        ask = AskingHere(asked, rows, answered, texts, How.of(config, seed), meter)
        unedited = None if opened_base is None else ask.base(*opened_base)
        # One model at a time.
        opened_base = None
        opened = source.open()
        measured = ask.model(*opened, unedited)
    scores = _abilities(tasks, opened)
    figures: dict[str, Any] = figures_of(measured, rows, unedited)
    figures["intervals"] = intervals_of(measured, rows, unedited)
    if groups := grouped(column, table.table, rows, {"": measured.rows}):
        figures["groups"] = _flat(groups)
    if tasks is not None:
        _add_abilities(figures, tasks, base_scores, scores)
    figures["counts"] = {"measured": len(chosen), "rejected": len(table.rejected)}
    _show(figures, console)
    if output is not None:
        output.write_bytes(json_bytes(figures))


def _abilities(tasks: HarnessTasks | None, opened: _Opened | None) -> list[TaskScores]:
    """The scores of an open model in each task; none without either."""
    if tasks is None or opened is None:
        return []
    with RichProgress().stage(HARNESS, tasks.total) as bar:
        return harness_here(tasks, *opened, bar)


def _add_abilities(
    figures: dict[str, Any],
    tasks: HarnessTasks,
    before: Sequence[TaskScores],
    scores: Sequence[TaskScores],
) -> None:
    figures["harness"] = mean_of(scores)
    if interval := interval_of_mean(scores):
        figures["intervals"] |= rounded({"harness": interval})
    figures["harness_tasks"] = {
        "version": tasks.version,
        "limit": tasks.config.limit,
        "tasks": compared(before, scores) if before else alone(scores),
    }


def _refuse_output(
    output: Path, model: str, requests: Sequence[str], corpus: Sequence[str], base: str | None
) -> None:
    """Refuse to overwrite an input or a file that pmet did not write."""
    read = [("model", model_places(model)), ("--base", model_places(base) if base else [])]
    read += [("requests", pattern_places(requests)), ("--corpus", pattern_places(corpus))]
    refuse_overlap(("--output", str(output)), read)
    store = Store(output.absolute().parent)
    refuse_foreign_file(store, output.name, is_json_with("intervals", "counts", "efficacy"))


def _source(model: str) -> ModelSource:
    checkpoint = Checkpoint.open(open_model_folder(model, default_cache()))
    check_readable(checkpoint, open_fast_tokenizer(checkpoint.folder))
    return ModelSource(str(checkpoint.folder), torch.cuda.is_available())


def _flat(groups: dict[str, Any]) -> dict[str, Any]:
    """Flatten groups of one model: its figures become keys of each group."""
    rows = [
        {
            "name": group["name"],
            "requests": group["requests"],
            **group[""],
            "intervals": group["intervals"][""],
        }
        for group in groups["rows"]
    ]
    return {**groups, "rows": rows}


def _show(figures: Mapping[str, Any], console: Console) -> None:
    counts, intervals = figures["counts"], figures["intervals"]
    said = Table("in its own words", "", "95 %")
    for name in ANSWERED:
        if figures.get(name) is not None:
            label = figure_of(name).label
            said.add_row(label, percent(figures[name]), _between(intervals.get(name)))
    shown = Table("", "probability", "95 %", "strict", "by tokens")
    for kind in KINDS:
        if figures[f"{kind}_strict"] is not None:
            forms = [figures[f"{kind}{form}"] for form in ("", "_strict", "_accuracy")]
            first, *others = map(percent, forms)
            shown.add_row(kind, first, _between(intervals.get(kind)), *others)
    shown.add_row("score", percent(figures["score"]), _between(intervals.get("score")), "", "")
    for name in ("consistency", "agreement", "harness"):
        if figures.get(name) is not None:
            shown.add_row(name, percent(figures[name]), _between(intervals.get(name)), "", "")
    for name, unit in (("fluency", " bits"), ("perplexity", "")):
        if figures.get(name) is not None:
            between = intervals.get(name)
            text = "" if between is None else " to ".join(f"{x:.3f}" for x in between)
            shown.add_row(name, f"{plain(figures[name])}{unit}", text, "", "")
    console.print(f"{counts['measured']} requests, {counts['rejected']} invalid rows left out")
    if said.row_count:
        console.print(said)
    console.print(shown)
    show_harness({"harness": figures.get("harness_tasks")}, console)
    if "groups" in figures:
        _show_groups(figures["groups"], console)


def _show_groups(groups: Mapping[str, Any], console: Console) -> None:
    shown = Table(Column(Text(groups["column"])), "requests", *KINDS[:3], "score")
    for group in groups["rows"][:SHOWN_GROUPS]:
        values = (percent(group[name]) for name in (*KINDS[:3], "score"))
        shown.add_row(Text(group["name"]), str(group["requests"]), *values)
    console.print(shown)


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else " to ".join(f"{100 * x:.1f}" for x in interval)
