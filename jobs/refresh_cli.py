"""``pmet refresh``, ``pmet rollback`` and ``pmet versions``: keeping a model up to date."""

from __future__ import annotations

from datetime import date
from typing import Annotated

import typer
from rich.console import Console

from jobs.arguments import RayAddress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Home = Annotated[
    str, typer.Argument(help="The home folder named in the refresh file: a path or a URL.")
]


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
        typer.Option(
            "--date",
            metavar="DATE",
            help="Date of the dump to read, such as 2026-11-23. Default: today.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the refresh would change; start nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, even if nothing has changed.")
    ] = False,
    address: RayAddress = None,
) -> None:
    """Update a model to match the latest fact dump and promote it if it passes the gates."""
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
        typer.Option(
            min=1, help="Version to switch to. Default: the one in use before the current one."
        ),
    ] = None,
) -> None:
    """Switch to an earlier version immediately."""
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
        bool, typer.Option("--current", help="Print only the location of the model in use.")
    ] = False,
) -> None:
    """Show the versions in a home folder, what each refresh did and which one is in use."""
    from jobs.refresh.home import Home as RefreshHome
    from jobs.refresh.views import show_versions
    from pipeline.errors import RunFolderError

    place = RefreshHome.open(home)
    if not current:
        show_versions(place, out)
        return
    promotion = place.current()
    if promotion is None:
        raise RunFolderError(f"no version in {place.store.url} has been promoted yet")
    typer.echo(place.store.join(promotion.model))


def _date(text: str | None) -> date | None:
    from pipeline.errors import FactDumpError

    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise FactDumpError(f"--date: {text!r} is not a date; write it like 2026-11-23") from None
