"""``pmet schedule``: runs refreshes on a schedule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

schedule = typer.Typer(
    name="schedule",
    help="Run refreshes on a schedule and show what each run did.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Name = Annotated[str, typer.Argument(help="Name of the schedule.")]
StoreURL = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="PMET_SCHEDULES",
        help="Folder with the schedules and their logs: a path or a URL that all runners share.",
    ),
]
DEFAULT_STORE = "~/.pmet/schedules"


@schedule.command()
def add(
    name: Annotated[str, typer.Argument(help="Name: lower-case letters, digits and hyphens.")],
    refresh: Annotated[
        str, typer.Argument(metavar="REFRESH.yaml", help="Refresh file: a path or URL.")
    ],
    cron: Annotated[
        str, typer.Option(help="Cron: minute, hour, day of month, month, day of week.")
    ] = "0 2 * * *",
    timezone: Annotated[
        str, typer.Option(help="Time zone of the cron expression, e.g. Europe/Berlin.")
    ] = "UTC",
    catch_up: Annotated[
        str,
        typer.Option(help="Missed runs: once runs one catch-up, never skips them."),
    ] = "once",
    retries: Annotated[
        int, typer.Option(min=0, max=10, help="How often to retry a failed run.")
    ] = 1,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Working folder of the refresh. Default: this one, if its file is local."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing one.")] = False,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Add a schedule: what to refresh, and when."""
    from jobs.schedule.book import open_book
    from jobs.schedule.cron import next_time
    from jobs.schedule.records import make_schedule
    from jobs.schedule.views import local
    from pipeline.errors import ScheduleError, StorageError
    from pipeline.storage import Store, read_file

    try:
        read_file(refresh, limit=1)
    except StorageError as error:
        raise ScheduleError(f"refresh file: {error}") from None
    file, now = Store(refresh), datetime.now(UTC)
    if directory is None and file.is_local:
        directory = Path.cwd()
    new = make_schedule(
        name=name,
        refresh=file.url,
        cron=cron,
        timezone=timezone,
        directory=None if directory is None else str(directory.resolve()),
        catch_up=catch_up,
        retries=retries,
        added_at=now,
        since=now,
    )
    book = open_book(store)
    book.add(new, replace=replace)
    due = next_time(new.cron, new.timezone, now)
    out.print(f"{name}: next due {local(due)}; in {book.url}", markup=False, soft_wrap=True)


@schedule.command(name="list")
def list_(store: StoreURL = DEFAULT_STORE) -> None:
    """Show all schedules, when each is due next and how its last run ended."""
    from jobs.schedule.book import open_book
    from jobs.schedule.views import show_schedules

    show_schedules(open_book(store), datetime.now(UTC), out)


@schedule.command()
def log(
    name: Name,
    limit: Annotated[int, typer.Option(min=1, help="Number of most recent attempts to show.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line.")
    ] = False,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Show what each run of a schedule did."""
    from itertools import islice

    from jobs.schedule.book import open_book
    from jobs.schedule.views import show_log

    book = open_book(store)
    nights = list(islice(book.nights(name), limit))[::-1]
    if not nights:
        book.get(name)
    if as_json:
        for night in nights:
            typer.echo(night.model_dump_json())
    else:
        show_log(book, nights, out)


@schedule.command()
def remove(
    name: Name,
    purge: Annotated[bool, typer.Option("--purge", help="Delete its log too.")] = False,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Remove a schedule but keep its log."""
    from jobs.schedule.book import open_book

    open_book(store).remove(name, purge=purge)
    out.print(f"{name}: removed{' with its log' if purge else ''}", markup=False)


@schedule.command()
def enable(name: Name, store: StoreURL = DEFAULT_STORE) -> None:
    """Enable a schedule again; runs missed while it was disabled are skipped."""
    _enable(name, store, True)


@schedule.command()
def disable(name: Name, store: StoreURL = DEFAULT_STORE) -> None:
    """Disable a schedule without removing it; a run in progress continues."""
    _enable(name, store, False)


@schedule.command()
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Schedules to run. Default: all."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Run what is due now, then exit.")] = False,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Run schedules as they become due, one at a time, until stopped by a signal."""
    from jobs.schedule.book import open_book
    from jobs.schedule.night import Clock
    from jobs.schedule.runner import Runner

    def say(line: str) -> None:
        err.print(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}", markup=False, soft_wrap=True)

    book, clock = open_book(store), Clock()
    runner = Runner(book, clock=clock, say=say, names=names or ())
    with clock.stopped_by_signals():
        if once:
            raise typer.Exit(runner.run_due())
        say(f"running the schedules of {book.url}; stop with Ctrl-C or SIGTERM")
        runner.serve()
        say("stopped")


@schedule.command()
def systemd(
    name: Name,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write both units to. Default: print them.")
    ] = None,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Write a systemd service and timer that run a schedule on this machine."""
    from jobs.schedule.book import open_book
    from jobs.schedule.systemd import MARKS, units
    from pipeline.storage import Store, holds_text, refuse_foreign_file

    book = open_book(store)
    for file, text in units(book.get(name), book.url).items():
        if output is None:
            typer.echo(f"# {file}\n{text}")
        else:
            folder = Store(output)
            refuse_foreign_file(folder, file, holds_text(*MARKS))
            folder.write_bytes(file, text.encode())
            out.print(folder.join(file), markup=False, soft_wrap=True)


@schedule.command()
def kubernetes(
    name: Name,
    image: Annotated[str, typer.Option(help="Image with pmet and Ray.")],
    namespace: Annotated[str, typer.Option(help="Namespace of all objects.")] = "default",
    workers: Annotated[int, typer.Option(min=0, help="Worker pods in addition to the head.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs per pod.")] = 4,
    memory: Annotated[str, typer.Option(help="Memory per pod.")] = "16Gi",
    gpus: Annotated[int, typer.Option(min=0, help="NVIDIA GPUs per worker.")] = 0,
    ray_version: Annotated[
        str, typer.Option(help="Ray version in the image. Default: the one installed here.")
    ] = "",
    kubectl_image: Annotated[
        str | None, typer.Option(help="Image with kubectl and sh that creates the RayJob.")
    ] = None,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Print Kubernetes objects that run a schedule: a CronJob that creates a KubeRay RayJob."""
    from jobs.schedule.book import open_book
    from jobs.schedule.kubernetes import KUBECTL_IMAGE, Cluster, manifests

    cluster = Cluster(
        image=image,
        namespace=namespace,
        workers=workers,
        cpus=cpus,
        memory=memory,
        gpus=gpus,
        ray_version=ray_version,
        kubectl_image=kubectl_image or KUBECTL_IMAGE,
    )
    typer.echo(manifests(open_book(store).get(name), cluster), nl=False)


def _enable(name: str, store: str, enabled: bool) -> None:
    from jobs.schedule.book import open_book

    open_book(store).enable(name, enabled, datetime.now(UTC))
    out.print(f"{name}: {'enabled' if enabled else 'disabled'}", markup=False)
