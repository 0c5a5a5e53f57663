"""``pmet refresh``, ``pmet rollback`` and ``pmet versions``: a model that is kept up to date."""

from __future__ import annotations

from datetime import date
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Home = Annotated[str, typer.Argument(help="The home of a refresh file: a path or a URL.")]


def refresh(
    file: Annotated[
        str, typer.Argument(metavar="REFRESH.yaml", help="Refresh file: a path or a URL.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the refresh file."),
    ] = None,
    night: Annotated[
        str | None,
        typer.Option("--date", metavar="DATE", help="Whose dump is read, as 2026-11-23; today."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the night would change, start nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do the night anew, also where nothing has changed.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to run on, host:port; without it one is started here."),
    ] = None,
) -> None:
    """Bring a model to what the latest fact dump says, and put it to use if the gates hold."""
    from jobs.refresh.config import load_refresh
    from jobs.refresh.night import preview
    from jobs.refresh.night import refresh as run_night
    from jobs.refresh.views import show_night, show_preview
    from pipeline.progress import RichProgress

    config, day = load_refresh(file, settings or []), _date(night)
    if dry_run:
        show_preview(preview(config, night=day), out)
        return
    result = run_night(config, night=day, progress=RichProgress(err), fresh=fresh, address=address)
    show_night(result, out)
    if result.status == "held":
        raise typer.Exit(3)


def rollback(
    home: Home,
    to: Annotated[
        int | None,
        typer.Option(min=1, help="Version to put to use; the one before, if not given."),
    ] = None,
) -> None:
    """Put an earlier version to use, at once."""
    from jobs.refresh.home import Home as RefreshHome

    place = RefreshHome.open(home)
    promotion = place.rollback(to)
    out.print(
        f"version {promotion.version} is in use: {place.store.join(promotion.model)}",
        markup=False,
        soft_wrap=True,
    )


def versions(
    home: Home,
    current: Annotated[
        bool, typer.Option("--current", help="Print only where the model in use is.")
    ] = False,
) -> None:
    """Show the versions of a home, what each night did, and which one is in use."""
    from jobs.refresh.home import Home as RefreshHome
    from jobs.refresh.views import show_versions
    from pipeline.errors import RunFolderError

    place = RefreshHome.open(home)
    if not current:
        show_versions(place, out)
        return
    promotion = place.current()
    if promotion is None:
        raise RunFolderError(f"no version was put to use yet at {place.store.url}")
    typer.echo(place.store.join(promotion.model))


def _date(text: str | None) -> date | None:
    from pipeline.errors import FactDumpError

    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise FactDumpError(f"--date: {text!r} is not a date; write it as 2026-11-23") from None
