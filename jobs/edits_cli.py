"""``pmet apply``, ``revert``, ``export`` and ``push``: edits on models, off them, and elsewhere."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from pipeline.edits import Rewritten
    from pipeline.export import Exported
    from pipeline.push import Pushed

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Edit = Annotated[
    str,
    typer.Argument(
        metavar="RUN|DELTA",
        help="Edit: a run folder, a run's delta folder, an exported delta, or an edit file; a path "
        "or a URL.",
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


class Format(StrEnum):
    """What `pmet export` writes."""

    DELTA = "delta"
    ADAPTER = "adapter"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder: a path or a URL.")],
    output: Annotated[
        str, typer.Option(help="Folder for the export, empty or new: a path or a URL.")
    ],
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="delta: the changes of the weights, for pmet apply; adapter: a LoRA adapter, for "
            "peft, vLLM or SGLang.",
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(help="Largest rank of the adapter. Default: the rank of the change, exact."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Share of each change's squared singular values that the adapter keeps, such as "
            "0.99."
        ),
    ] = None,
    no_measure: Annotated[
        bool,
        typer.Option("--no-measure", help="Do not measure the scores of a truncated adapter."),
    ] = False,
) -> None:
    """Write a run's edit alone, as deltas or as a LoRA adapter, with a card."""
    from pipeline.export import export_run
    from pipeline.progress import RichProgress

    exported = export_run(
        run,
        output,
        kind=format_.value,
        rank=rank,
        energy=energy,
        measure=not no_measure,
        progress=RichProgress(err),
    )
    _show_export(exported)


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
    _show_push(pushed)


def _show_export(exported: Exported) -> None:
    record = exported.record
    if record["format"] == "delta":
        lines = [f"{_number(len(record['weights']), 'changed weight')} of {_facts(record)}"]
    else:
        out.print(_ranks(record["weights"]))
        lines = [_holds(record)]
    size = sum(file["bytes"] for file in record["files"])
    lines.insert(0, f"{size / 1e6:,.1f} MB in {_number(len(record['files']), 'file')}")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
    if record["scores"].get("adapter"):
        out.print(_scores(record))
    out.print(exported.store.url, markup=False, soft_wrap=True)


def _show_push(pushed: Pushed) -> None:
    contents = pushed.contents
    count = len(contents.files)
    files = f"{count} file{'' if count == 1 else 's'}, {pushed.bytes / 1e6:,.1f} MB"
    done = "pushed" if pushed.changed else "nothing to do, all of it is there"
    for line in (contents.title, f"{done}: {files}", pushed.url):
        out.print(line, markup=False, soft_wrap=True)


def _facts(record: dict[str, Any]) -> str:
    return _number(record["facts"], "fact")


def _ranks(weights: list[dict[str, Any]]) -> Table:
    first = Column("weight", overflow="fold")
    table = Table(first, "rank", "of", "energy", "‖B·A − Δ‖/‖Δ‖", "largest")
    for weight in weights:
        table.add_row(
            weight["parameter"],
            str(weight["rank"]),
            str(weight["full_rank"]),
            f"{100 * weight['energy']:.4g} %",
            f"{weight['error']:.1e}",
            f"{weight['largest_error']:.1e}",
        )
    return table


def _holds(record: dict[str, Any]) -> str:
    """What holds for an adapter."""
    rank, error = record["rank"], max(weight["error"] for weight in record["weights"])
    if record["exact"]:
        return (
            f"exact: an adapter of rank {rank} with all of {_facts(record)}; B·A differs from Δ by "
            f"{error:.1e} of its size at most, which is rounding, so the run's scores hold"
        )
    lost = f"truncated: an adapter of rank {rank}; B·A differs from Δ by {error:.1%} of its size"
    if record["scores"]["adapter"] is None:
        return f"{lost}; its scores were not measured, and the run's do not hold for it"
    return f"{lost}; its scores were measured again ({record['measured_on']}):"


def _scores(record: dict[str, Any]) -> Table:
    from pipeline.evaluation import measured, show, show_change

    base, run, own = (record["scores"][name] for name in ("before", "run", "adapter"))
    table = Table("", "before", "run", "adapter", "adapter − run")
    for figure in measured(run, own):
        values = [scores.get(figure.name) for scores in (base, run, own)]
        cells = [show(value, figure.name) for value in values]
        table.add_row(figure.label, *cells, show_change(values[2], values[1], figure.name))
    return table


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
