"""``pmet apply`` and ``pmet revert``: putting a saved edit on a checkpoint, and taking it off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pipeline.edits import Rewritten

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Edit = Annotated[
    str,
    typer.Argument(
        metavar="RUN|DELTA",
        help="Edit: a run folder, a run's delta folder, or an edit file; a path or a URL.",
    ),
]
Output = Annotated[
    str,
    typer.Option(help="Folder for the checkpoint, empty or new: a path or a URL."),
]


def apply(
    edit: Edit,
    model: Annotated[str, typer.Argument(help="Model: a folder, a GGUF file, a URL or a hub id.")],
    output: Output,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Apply the edit to a model that it was not made for: add Δ to what is there.",
        ),
    ] = False,
) -> None:
    """Write a copy of a model with a saved edit applied to it."""
    from pipeline.edits import apply_edit
    from pipeline.progress import RichProgress

    written = apply_edit(edit, model, output, force=force, progress=RichProgress(err))
    _show(written, _applied(written))


def revert(
    edit: Edit,
    model: Annotated[
        str,
        typer.Argument(metavar="EDITED_MODEL", help="Model that carries the edit, as for apply."),
    ],
    output: Output,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Subtract Δ even from weights that do not hold the edit.",
        ),
    ] = False,
) -> None:
    """Write a copy of an edited model with an edit taken off, whichever was applied last."""
    from pipeline.edits import revert_edit
    from pipeline.progress import RichProgress

    written = revert_edit(edit, model, output, force=force, progress=RichProgress(err))
    _show(written, _reverted(written))


def _show(written: Rewritten, sentences: list[str]) -> None:
    count, files = len(written.tensors), written.files
    lines = [
        f"{_number(count, 'tensor')} in {_number(files, 'file')} changed; everything else is "
        "copied byte for byte",
        *sentences,
    ]
    if written.without_card:
        lines.append("README.md, the card of the model that a run published, was left out")
    if written.carried:
        lines.append(f"the model carries {_number(len(written.carried), 'edit')}:")
        lines += [f"  {source}" for source in written.carried]
    for line in (*lines, written.store.url):
        out.print(line, markup=False, soft_wrap=True)


def _applied(written: Rewritten) -> list[str]:
    """What holds for a model that an edit was applied to."""
    exact, stacked, forced = (written.count(how) for how in ("exact", "stacked", "forced"))
    said = []
    if exact:
        said.append(
            f"exact: {_number(exact, 'tensor')} held the values that the edit was made for, and "
            "now W + Δ"
        )
    if stacked:
        said.append(
            f"stacked: Δ was added to {_number(stacked, 'tensor')} that other edits of the same "
            "base had changed, in float64 and rounded once"
        )
    if forced:
        said.append(
            f"forced: Δ was added to {_number(forced, 'tensor')} that the edit was not made for, "
            "in float64 and rounded once; nothing has measured the result"
        )
    if written.other_rest:
        said.append(
            "forced: the rest of the model is not the base of the run; nothing has measured it"
        )
    said.append("pmet revert restores every byte as long as this edit is the last one applied")
    return said


def _reverted(written: Rewritten) -> list[str]:
    """What holds for a model that an edit was taken off."""
    exact, rounded, forced = (written.count(how) for how in ("exact", "rounded", "forced"))
    said = []
    if exact:
        what = "as the other edits alone leave it" if written.carried else "as before the edit"
        said.append(f"exact: {_number(exact, 'tensor')} restored to the byte, {what}")
    for how, count in (("rounded", rounded), ("forced", forced)):
        if count:
            said.append(_inexact(written, how, count))
    if written.is_base:
        said.append("the model is the base of the run, byte for byte (model card aside)")
    elif written.is_base is False:
        said.append("the model is not the base of the run: other weights or files differ")
    return said


def _inexact(written: Rewritten, how: str, count: int) -> str:
    elements, by = written.rounding(how)
    why = {
        "rounded": f"to rounding: Δ was subtracted from {_number(count, 'tensor')}",
        "forced": f"forced: Δ was subtracted from {_number(count, 'tensor')} that did not hold it",
    }
    return (
        f"{why[how]}, in float64 and rounded once; up to {elements:,} elements may differ from "
        f"their former values, by about {by:.1g} at most"
    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
