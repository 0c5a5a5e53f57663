"""``pmet push``: a model or an edit, with its card, to a hub repository or to any storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pipeline.push import Pushed

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def push(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A run folder, whose model is pushed; an export; or the home of a refresh, or "
            "its CURRENT, whose model in use is pushed. A path or a URL.",
        ),
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="hf://ORG/NAME or hf://ORG/NAME@BRANCH, with the token in HF_TOKEN; or an empty "
            "or new folder: a path or a URL.",
        ),
    ],
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Create a public repository, or push to one. Default: private."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Push a model that a gate held back."),
    ] = False,
) -> None:
    """Upload a model, an adapter or deltas with the card, to a hub or to any storage."""
    from jobs.refresh.home import model_in_use
    from pipeline.errors import HeldBackError
    from pipeline.progress import RichProgress
    from pipeline.push import push as push_files

    source = model_in_use(what) or what
    progress = RichProgress(err)
    try:
        pushed = push_files(source, destination, public=public, force=force, progress=progress)
    except HeldBackError as error:
        err.print(f"pmet: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(3) from None
    _show(pushed)


def _show(pushed: Pushed) -> None:
    contents = pushed.contents
    count = len(contents.files)
    files = f"{count} file{'' if count == 1 else 's'}, {pushed.bytes / 1e6:,.1f} MB"
    done = "pushed" if pushed.changed else "nothing to do, all of it is there"
    for line in (contents.title, f"{done}: {files}", pushed.url):
        out.print(line, markup=False, soft_wrap=True)
