"""Options that several commands take, and their values."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from pipeline.errors import JobError

JobSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job, e.g. seed=1."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to run on, as host:port. Default: start one on this machine."),
]
Workers = Annotated[
    str,
    typer.Option(
        help="Number of processes, each with a model replica. auto: as many as the cluster has "
        "room for; 0: this process, without Ray."
    ),
]
GPUsPerWorker = Annotated[
    float, typer.Option(min=0, help="GPUs per worker; 0: run on the CPU in float32.")
]

AUTO: Final = "auto"
_MOST_DIGITS = 4000
"""Python reads no longer numbers."""


def whole_or_auto(
    option: str, text: str, *, least: int = 0, digits: int = _MOST_DIGITS
) -> int | None:
    """Read a whole number, or ``auto``, which is None.

    Args:
        option: the option's name, for messages.
        text: its value.
        least: the smallest number allowed, 0 or 1.
        digits: how many digits are read.

    Raises:
        JobError: it is neither.
    """
    if text == AUTO:
        return None
    if not (text.isdecimal() and len(text) <= digits and int(text) >= least):
        above = " above 0" if least else ""
        raise JobError(f"{option}: {text!r} is neither {AUTO} nor a whole number{above}")
    return int(text)
