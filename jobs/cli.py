"""The command line, ``pmet``.

Exit status: 0 success, 2 bad input, 3 a quality gate held the edited model back, 130, 143 or 129
stopped by SIGINT, SIGTERM or SIGHUP, 1 anything else. Each failure is one clear message, without a
traceback.

The heavy libraries are imported inside the commands, so that ``--help`` answers at once.
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
from jobs.facts_cli import facts
from jobs.refresh_cli import refresh, rollback, versions
from jobs.schedule_cli import schedule
from jobs.submit_cli import list_, logs, status, stop, submit
from pipeline.cluster import signals

if TYPE_CHECKING:
    from pipeline.job import JobConfig

# typer has its own copy of click, or uses the one that is installed.
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
    "143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP. PMET_TRACEBACK=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(facts)
for command in (refresh, rollback, versions, submit, status, logs, stop):
    app.command()(command)
app.command(name="list")(list_)
app.add_typer(schedule)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job, e.g. seed=1."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to run on, host:port; without it one is started here."),
]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("demo-run"),
) -> None:
    """Change 200 facts of a small bundled model, and show what it says before and after."""
    from jobs.demo.show import run_demo

    run_demo(output, out)


@app.command()
def run(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="Job file: a path or a URL.")],
    settings: Settings = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, show the plan and how long it will take, start nothing.",
        ),
    ] = False,
    no_estimate: Annotated[
        bool,
        typer.Option("--no-estimate", help="A dry run that computes nothing, and tells no time."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what the run folder holds and start over.")
    ] = False,
    address: Address = None,
    log_lines: Annotated[
        bool,
        typer.Option("--log-lines", help="Tell everything in lines of key=value, for logs."),
    ] = False,
) -> None:
    """Run a job: edit a model, publish it, measure it, report."""
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
        with err.status("computing some of the job, to tell how long it will take"):
            found = estimated(plan)
    except JobError as error:
        out.print(f"no estimate: {error}", style="yellow", markup=False, soft_wrap=True)
    else:
        show_estimate(found, out)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model: a folder, a URL or a hub id.")],
    requests: Annotated[list[str], typer.Argument(help="Parquet files of edit requests.")],
    sample: Annotated[
        int | None, typer.Option(min=1, help="Measure this many requests, drawn under the seed.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the sample, and of what the model writes.")
    ] = 0,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Parquet files of ordinary text, to measure perplexity on."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, to measure agreement with on the corpus.")
    ] = None,
    perplexity_texts: Annotated[
        int, typer.Option(min=1, help="Texts of the corpus that are read.")
    ] = 256,
    group_by: Annotated[
        str | None, typer.Option(help="Column by which figures are given as well.")
    ] = None,
    fluency: Annotated[
        bool, typer.Option("--fluency", help="Let the model write; fluency and consistency.")
    ] = False,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask every prompt as a user's turn of a chat.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the figures as JSON to this file.")
    ] = None,
) -> None:
    """Measure how well a model holds edit requests, without editing it."""
    from jobs.measure import evaluate_model
    from pipeline.job import EvaluateConfig

    config = EvaluateConfig(
        sample=sample,
        perplexity_texts=perplexity_texts,
        group_by=group_by,
        fluency=fluency,
        chat_template=chat_template,
    )
    evaluate_model(
        model, requests, config, seed=seed, corpus=corpus, base=base, output=output, console=out
    )


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(help="Model: a folder, a URL or a hub id.")],
    corpus: Annotated[
        list[str], typer.Argument(help="Parquet files of ordinary text, in a column text.")
    ],
    output: Annotated[
        str, typer.Option(help="Folder to keep them in, a job's second_moments: a path or a URL.")
    ],
    hparams: Annotated[
        str | None, typer.Option(help="Preset or hyper-parameter file that names the layers.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="The layers themselves, as 3,4,5.")] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Token budget; the corpus is read until it is met.")
    ] = 1_000_000,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens that each text is cut at.")] = 1024,
    workers: Annotated[
        str,
        typer.Option(
            help="Processes with a model replica each; auto: what the cluster holds; "
            "0: this process, without Ray."
        ),
    ] = "auto",
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="GPUs of each worker; 0: on the CPU, in float32.")
    ] = 0,
    address: Address = None,
) -> None:
    """Compute a model's second moments over a corpus, once, for any number of jobs."""
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
        typer.Argument(metavar="OTHER", help="A second run, to be compared with the first."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Where the comparison goes: a folder, or a file that ends with .html; without it "
            "compare.html in the second run's folder."
        ),
    ] = None,
) -> None:
    """Write a run's report.html anew, or compare two runs side by side."""
    from jobs.reports import compare, rewrite
    from pmet.errors import InputError

    if other is not None:
        compare(run_folder, other, output, out)
    elif output is not None:
        raise InputError("--output goes with two runs; a run's report is written into its folder")
    else:
        rewrite(run_folder, out)


def main() -> None:
    """Run the command that the arguments of this process name, and end the process."""
    streams.protect()
    failure.hook()
    signals.install()
    try:
        from pipeline.storage import libraries_environment

        # Before any of the libraries is imported.
        os.environ.update(libraries_environment())
        status = _invoke(sys.argv[1:])
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends as a sentence
        # Before the exception is let go: what asks the process to stop has been heard.
        signals.end()
        status = failure.explain(error, _invoked())
    signals.end()
    if (lost := streams.finish()) is not None:
        status = status or failure.explain_lost_output(lost, _invoked())
    sys.exit(status)


def _invoke(arguments: list[str]) -> int:
    """Run a command; returns its exit status.

    This is what typer does itself, but for the exceptions that it hides: Ctrl-C, closed pipes.
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
    """The name of the command on the command line: ``run``, ``facts check``."""
    words = []
    command: Any = typer.main.get_command(app)
    for word in sys.argv[1:]:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        words.append(word)
    return " ".join(words)
