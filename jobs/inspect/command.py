"""``pmet inspect``: where a model holds its facts, and which layers to edit."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from jobs.arguments import GPUsPerWorker, RayAddress, Workers

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def inspect(
    model: Annotated[str, typer.Argument(help="Model: a folder, a GGUF file, a URL or a hub id.")],
    facts: Annotated[
        list[str],
        typer.Argument(help="Parquet files of edit requests with target_true, what it knows."),
    ],
    output: Annotated[
        str, typer.Option(help="Folder for the result, empty or new: a path or a URL.")
    ],
    hparams: Annotated[
        str | None,
        typer.Option(
            help="Preset or hyper-parameter file to optimise targets with; it also says how many "
            "layers to recommend. Default: the preset that fits the model, or the published values."
        ),
    ] = None,
    number: Annotated[
        int, typer.Option("--facts", min=1, help="Number of facts, drawn with the seed.")
    ] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Noise samples for each fact.")] = 5,
    workers: Workers = "auto",
    gpus_per_worker: GPUsPerWorker = 0,
    address: RayAddress = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the noise, the choice of facts and the contexts.")
    ] = 0,
) -> None:
    """Find where a model holds its facts, by causal tracing, and which layers to edit."""
    from jobs.inspect.inspection import PAGE, Settings, inspect_model
    from jobs.inspect.views import show_inspected
    from pipeline.progress import RichProgress

    settings = Settings(
        output=output,
        hparams=hparams,
        facts=number,
        samples=samples,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        address=address,
        seed=seed,
    )
    found = inspect_model(model, facts, settings, progress=RichProgress(err))
    show_inspected(found.record, found.store.join(PAGE), out)
